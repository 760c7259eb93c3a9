"""Models of every supported family, built tiny from their configs, and inputs for them."""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE_TOKEN, PAD, VOCABULARY, SIDE, PATCH = 99, 0, 100, 48, 8
TOKENS = (SIDE // PATCH) ** 2


def tiny_llava(attention: str = "sdpa", **settings) -> LlavaForConditionalGeneration:
    """36 visual tokens of width 32 from a 3-layer CLIP, into a 4-layer Llama of width 48."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=2,
            max_position_embeddings=512,
        ),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=TOKENS,
        **settings,
    )
    config._attn_implementation = attention
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation(attention)
    # Weights of the usual 0.02 make every token alike; larger ones make attention and answers depend on the picture.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.3 if "vision_tower" in name else 0.15)
    return model


def prompt(*parts: int | str, tokens: int = TOKENS) -> list[int]:
    """Token ids; the word "image" stands for one picture's placeholders."""
    ids: list[int] = []
    for part in parts:
        ids += [IMAGE_TOKEN] * tokens if part == "image" else [part]
    return ids


def batch(*rows: list[int], pictures: int = 0, pad: str = "left", seed: int = 1) -> dict[str, torch.Tensor]:
    """Model inputs for prompts of different lengths, with random pictures."""
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap = longest - len(row)
        ids.append([PAD] * gap + row if pad == "left" else row + [PAD] * gap)
        mask.append([0] * gap + [1] * len(row) if pad == "left" else [1] * len(row) + [0] * gap)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    if pictures:
        generator = torch.Generator().manual_seed(seed)
        inputs["pixel_values"] = torch.randn(pictures, 3, SIDE, SIDE, generator=generator)
    return inputs


def save_checkpoint(folder) -> None:
    """A tiny LLaVA with processor, as a folder that `from_pretrained` loads; words are numbers and a few letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": IMAGE_TOKEN}
    words |= {f"w{n}": n for n in range(4, IMAGE_TOKEN)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(size=size, do_center_crop=False)
    processor = LlavaProcessor(images, fast, PATCH, "default", num_additional_image_tokens=1)
    processor.save_pretrained(folder)
    tiny_llava().save_pretrained(folder)
