"""Mini-Gemini HD: a global view and 2 x 2 crops of 4 x 4 patches each."""

from tests.families.mini_gemini import MiniGemini
from tests.tiny import SIDE


class MiniGeminiHD(MiniGemini):
    name = "mini_gemini_hd"
    seed = 2
    patch = 12
    image_grid = 2

    def tokens(self, image):
        return self.views(image) * (SIDE // self.patch) ** 2

    def views(self, image):
        return 1 + self.image_grid**2
