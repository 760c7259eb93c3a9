"""The methods: one file, one paper, one class, one name on the command line.

To add one, write its file and add one line here.
"""

from vlmzip.methods.downsample import Downsample as Downsample
from vlmzip.methods.no_compression import NoCompression as NoCompression
from vlmzip.methods.pool2d import Pool2d as Pool2d
from vlmzip.methods.qformer import QFormer as QFormer
from vlmzip.methods.random_tokens import RandomTokens as RandomTokens
from vlmzip.methods.visionzip import VisionZip as VisionZip
