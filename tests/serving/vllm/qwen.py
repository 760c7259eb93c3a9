"""Tiny Qwen models with random weights in a folder that vLLM loads, and requests with images and videos."""

import functools

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

import vlmzip
from tests.tiny import with_large_weights

IMAGE, VIDEO, START, END = 99, 98, 97, 96
#: Words of the answers; the last are digits and signs of timestamps, and markers.
SIGNS = {sign: 80 + n for n, sign in enumerate("0123456789.<>")} | {"seconds": 93}
MARKERS = {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": START, "<|vision_end|>": END}
LLM = dict(
    hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=4096,
)  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]}
VIT = dict(
    hidden_size=64, intermediate_size=96, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2,
    out_hidden_size=128,
)  # fmt: skip
IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
#: The largest image has 14 x 14 tokens.
SIZE = {"shortest_edge": 16 * 16, "longest_edge": 112 * 112}
CLIP = {"shortest_edge": 16 * 16, "longest_edge": 16 * 112 * 112}


def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{n}": n for n in range(4, 80)} | SIGNS | MARKERS
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"w\d+|seconds|[0-9.<>]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left", additional_special_tokens=list(MARKERS),
    )  # fmt: skip


def images_of(**settings):
    return dict(patch_size=4, merge_size=2, temporal_patch_size=2, **settings)


def qwen2_5_vl():
    vision = VIT | dict(depth=3, window_size=16, fullatt_block_indexes=[1, 2], tokens_per_second=2)
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=LLM | dict(rope_parameters=ROPE), **IDS)
    parts = Qwen2VLImageProcessor(**images_of(size=SIZE)), Qwen2VLVideoProcessor(**images_of(size=CLIP))
    return Qwen2_5_VLForConditionalGeneration, config, Qwen2_5_VLProcessor, parts


def qwen3_vl():
    vision = VIT | dict(depth=4, num_position_embeddings=36, deepstack_visual_indexes=[0, 1])
    text = LLM | dict(head_dim=32, rope_parameters=ROPE | {"mrope_interleaved": True})
    config = Qwen3VLConfig(vision_config=vision, text_config=text, **IDS)
    half = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)  # as published: vLLM has one normalisation for both
    images = Qwen2VLImageProcessor(**images_of(size=SIZE), **half)
    parts = images, Qwen3VLVideoProcessor(**images_of(size=CLIP), **half)
    return Qwen3VLForConditionalGeneration, config, Qwen3VLProcessor, parts


MAKERS = {"qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}


@functools.cache
def model_and_processor(name):
    model_class, config, processor_class, (images, videos) = MAKERS[name]()
    torch.manual_seed(0)
    model = with_large_weights(model_class(config), "sdpa")
    return model, processor_class(images, tokenizer(), videos, chat_template="")


def save(name, folder):
    """Write model and processor to a folder."""
    model, processor = model_and_processor(name)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def image(number, rows=5, cols=7):
    """Return a noisy image with this many rows and columns of visual tokens."""
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (8 * rows, 8 * cols, 3), dtype=np.uint8))


def video(number, frames=4, rows=3, cols=4, fps=8.0):
    """Return a noisy clip that has `frames` after each two were joined, with its metadata.

    Half of each frame is that of the frame before.
    """
    rng = np.random.default_rng(1000 + number)
    clip = rng.integers(0, 256, (2 * frames, 8 * rows, 8 * cols, 3), dtype=np.uint8)
    clip[1:, :, : 4 * cols] = clip[:1, :, : 4 * cols]
    metadata = {
        "fps": fps, "duration": 2 * frames / fps, "total_num_frames": 2 * frames,
        "frames_indices": list(range(2 * frames)), "video_backend": "opencv", "do_sample_frames": False,
    }  # fmt: skip
    return clip, metadata


class Asked:
    """A prompt with images and videos: `parts` has words, images, and clips with metadata."""

    def __init__(self, *parts):
        self.images = [part for part in parts if isinstance(part, Image.Image)]
        self.videos = [part for part in parts if isinstance(part, tuple)]
        self.prompt = "".join(part if isinstance(part, str) else self._placeholder(part) for part in parts)

    @staticmethod
    def _placeholder(part):
        kind = "video" if isinstance(part, tuple) else "image"
        return f"<|vision_start|><|{kind}_pad|><|vision_end|>"

    def for_vllm(self, compressor=None):
        data = {"image": self.images, "video": self.videos}
        kwargs = {} if compressor is None else {"mm_processor_kwargs": {"vlmzip": compressor}}
        data = {kind: values for kind, values in data.items() if values}
        return {"prompt": self.prompt, **({"multi_modal_data": data} if data else {}), **(kwargs if data else {})}

    def for_facade(self, processor):
        videos = {}
        if self.videos:
            keys = ("fps", "duration", "total_num_frames", "frames_indices", "video_backend")
            videos = {
                "videos": [torch.from_numpy(clip).movedim(-1, 1) for clip, _ in self.videos],
                "video_metadata": [{key: metadata[key] for key in keys} for _, metadata in self.videos],
                "do_sample_frames": False,
            }
        return processor(text=[self.prompt], images=self.images or None, return_tensors="pt", **videos)


#: New tokens of an answer.
NEW = 6


def of_vllm(engine, asked, compressors=None):
    """Return for each request the number of prompt tokens, the answer, and the logits of all words at each token."""
    from vllm import SamplingParams

    compressors = compressors if isinstance(compressors, list) else [compressors] * len(asked)
    requests = [each.for_vllm(compressor) for each, compressor in zip(asked, compressors, strict=True)]
    sampling = SamplingParams(temperature=0, max_tokens=NEW, min_tokens=NEW, logprobs=-1)
    outputs = engine.generate(requests, sampling, use_tqdm=False)
    return [
        (len(output.prompt_token_ids), list(answer.token_ids), torch.stack([logits(step) for step in answer.logprobs]))
        for output in outputs
        for answer in output.outputs
    ]


def logits(step):
    """Return the logits of all words at a token of an answer of vLLM."""
    assert len(step) == LLM["vocab_size"]
    return torch.tensor([step[word].logprob for word in range(len(step))])


def of_facade(name, asked, compressor):
    """Return the same from the façade on transformers."""
    model, processor = model_and_processor(name)
    answers = []
    with vlmzip.attach(model, compressor) as small, torch.inference_mode():
        for each in asked:
            inputs = each.for_facade(processor)
            out = small.generate(
                **inputs,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            plain = inputs["input_ids"].shape[1]
            images = small.report.images if each.images or each.videos else []
            count = plain - sum(image.before - image.after for image in images)
            tokens = out.sequences[0, plain:].tolist()
            answers.append((count, tokens, torch.cat(out.logits).float()))
    return answers
