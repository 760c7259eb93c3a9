import copy
import inspect
import warnings

import pytest
import torch

import vlmzip
from tests.families import tiny_llava
from tests.runtime.ragged import Ragged
from tests.tiny import IMAGE_TOKEN, batch, prompt
from vlmzip import NoCompression, Pool2d, RandomTokens, UserError, VisionZip

MIXED = (prompt(1, "image", 5, 6, 7), prompt(1, "image", 4, "image", 5), prompt(1, 2, 3, 4), prompt("image", 8))
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def alone(inputs, row, images):
    """One row of a batch as a batch of its own, without padding."""
    mask = inputs["attention_mask"][row].bool()
    out = {name: inputs[name][row][mask][None] for name in ("input_ids", "attention_mask")}
    if images:
        out["pixel_values"] = inputs["pixel_values"][images]
    return out


@pytest.mark.parametrize("pad", ["left", "right"])
def test_no_compression_is_the_plain_model(llava, pad):
    inputs = batch(*MIXED, images=4, pad=pad)
    compressed = vlmzip.attach(llava, NoCompression())
    with torch.no_grad():
        torch.testing.assert_close(compressed(**inputs).logits, llava(**inputs).logits, atol=1e-5, rtol=0)
    assert torch.equal(compressed.generate(**inputs, **GREEDY), llava.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize(
    "method", [VisionZip(keep=8), Pool2d(factor=4), RandomTokens(keep=5), Ragged()], ids=lambda m: m.name()
)
def test_every_row_of_a_ragged_batch_is_that_row_alone(llava, method, positions):
    method = type(method)(**{**{n: getattr(method, n) for n in method.field_names()}, "positions": positions})
    inputs = batch(*MIXED, images=4)
    compressed = vlmzip.attach(llava, method)
    with torch.no_grad():
        together = compressed(**inputs).logits
    generated = compressed.generate(**inputs, **GREEDY)
    width = inputs["input_ids"].shape[1]
    for row, images in enumerate([[0], [1, 2], [], [3]]):
        one = alone(inputs, row, images)
        with torch.no_grad():
            logits = compressed(**one).logits[0]
        torch.testing.assert_close(together[row, -len(logits) :], logits, atol=1e-5, rtol=0)
        new = compressed.generate(**one, **GREEDY)[0, one["input_ids"].shape[1] :]
        assert generated[row, width : width + len(new)].tolist() == new.tolist()


def test_ragged_counts_really_differ(llava):
    compressed = vlmzip.attach(llava, Ragged())
    compressed.generate(**batch(*MIXED, images=4), **GREEDY)
    assert len({image.after for image in compressed.report.images}) > 1


def test_compressed_forward_equals_a_hand_made_one(llava):
    """Encode, select, project and embed by hand; only the language model is shared."""
    from tests.references.visionzip import visionzip as naive

    inputs = batch(prompt(1, "image", 5, 6), images=1)
    eager = tiny_llava("eager")
    with torch.no_grad():
        tower = eager.model.vision_tower
        seen = tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
        norm = tower.encoder.layers[1].layer_norm1(seen.hidden_states[1])
        keys = torch.stack(tower.encoder.layers[1].self_attn.k_proj(norm)[0].split(8, dim=-1)).mean(0)
        kept = naive(seen.hidden_states[-2][0], seen.attentions[1][0, :, 0], keys, 7, 1, "reference")
        embed = llava.get_input_embeddings()
        sequence = torch.cat(
            [embed(torch.tensor([1])), llava.model.multi_modal_projector(kept), embed(torch.tensor([5, 6]))]
        )
        expected = llava.lm_head(llava.model.language_model(inputs_embeds=sequence[None]).last_hidden_state)
        compressed = vlmzip.attach(llava, VisionZip(dominant=7, contextual=1))
        torch.testing.assert_close(compressed(**inputs).logits, expected, atol=1e-5, rtol=0)


def test_generate_returns_the_original_prompt_then_the_new_tokens(llava):
    inputs = batch(*MIXED, images=4)
    compressed = vlmzip.attach(llava, VisionZip(keep=8))
    out = compressed.generate(**inputs, **GREEDY)
    width = inputs["input_ids"].shape[1]
    assert torch.equal(out[:, :width], inputs["input_ids"])
    assert out.shape[1] <= width + 8
    full = compressed.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(full.sequences, out)
    assert len(full.scores) == out.shape[1] - width


def test_max_length_counts_the_prompt_as_the_user_sees_it(llava):
    inputs = batch(prompt(1, "image", 5), images=1)
    compressed = vlmzip.attach(llava, VisionZip(keep=8))
    out = compressed.generate(**inputs, max_length=38 + 5, min_length=38 + 5, do_sample=False)
    assert out.shape[1] == 43


def test_loss_and_gradients_reach_projector_and_tower(llava):
    model = copy.deepcopy(llava)
    inputs = batch(*MIXED, images=4)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
    compressed = vlmzip.attach(model, VisionZip(keep=8))
    out = compressed(**inputs)
    shrunk = vlmzip.compress_inputs(model, inputs, VisionZip(keep=8))
    torch.testing.assert_close(out.loss, model(**shrunk).loss)
    out.loss.backward()
    for part in (model.model.multi_modal_projector.linear_1, model.model.vision_tower.encoder.layers[0].mlp.fc1):
        assert part.weight.grad.isfinite().all()
        assert part.weight.grad.abs().sum() > 0


def test_gradient_of_a_projector_weight_is_the_finite_difference(llava):
    model = copy.deepcopy(llava).double()
    inputs = batch(prompt("image", 5, 6), images=1)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    compressed = vlmzip.attach(model, VisionZip(keep=8))
    weight = model.model.multi_modal_projector.linear_1.weight
    compressed(**inputs).loss.backward()
    losses = []
    for step in (1e-3, -1e-3):
        with torch.no_grad():
            weight[3, 4] += step
            losses.append(compressed(**inputs).loss)
            weight[3, 4] -= step
    assert weight.grad[3, 4].item() == pytest.approx(
        (losses[0] - losses[1]).item() / 2e-3, rel=1e-2
    )  # some versions of transformers take the loss in float32


def traces(model):
    """Hooks and attributes of every module: what a façade could leave behind, beside weights."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    found = {}
    for name, module in model.named_modules():
        plain = (type(None), bool, int, float, str, torch.Tensor)
        # Their text compares tensors, too: Qwen2.5-VL keeps an offset of positions between calls.
        found |= {(name, key): str(value) if isinstance(value, plain) else "" for key, value in vars(module).items()}
        found |= {(name, kind): len(getattr(module, kind)) for kind in kinds}
    return found


class TestNoTrace:
    @pytest.mark.crossed(positions=["contiguous"])
    @pytest.mark.parametrize("positions", ["contiguous", "original"])
    @pytest.mark.parametrize("broken", [False, True])
    def test_after_detach_the_model_is_as_it_was(self, fresh, positions, broken):
        model = fresh.model
        inputs = fresh.batch([1, "image", 5, 6, 7], [1, "image", 4, "image", 5], [1, 2, 3, 4])
        with torch.no_grad():
            logits = model(**inputs).logits
        before = traces(model)
        state = {name: value.clone() for name, value in model.state_dict().items()}

        def work():
            with vlmzip.attach(model, VisionZip(keep=8, positions=positions)) as compressed:
                compressed(**inputs)
                compressed.generate(**inputs, **GREEDY)
                compressed.generate(**inputs, **GREEDY, num_beams=2)
                if broken:
                    pixels = torch.zeros(*inputs["pixel_values"].shape[:-2], 7, 7)
                    compressed(**{**inputs, "pixel_values": pixels})

        if broken:
            with pytest.raises(
                (ValueError, RuntimeError), match=r"Input image size|input size per channel|pixel_values has 7"
            ):
                work()
        else:
            work()
        assert traces(model) == before
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert list(model.state_dict()) == list(state)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, logits)

    def test_a_detached_facade_says_so(self, llava):
        with vlmzip.attach(llava, VisionZip(keep=8)) as compressed:
            pass
        with pytest.raises(UserError, match="was detached"):
            compressed.generate(**batch(prompt("image"), images=1), **GREEDY)
        assert compressed.detach() is llava


def test_two_facades_on_one_model_do_not_mix(llava):
    inputs = batch(prompt(1, "image", 5), images=1)
    a, b = vlmzip.attach(llava, VisionZip(keep=8)), vlmzip.attach(llava, VisionZip(keep=20))
    with torch.no_grad():
        first = a(**inputs).logits
        assert b(**inputs).logits.shape[1] == 22
        assert torch.equal(a(**inputs).logits, first)
    assert (a.report.after, b.report.after) == (8, 20)


def test_it_can_be_used_like_the_model(llava):
    compressed = vlmzip.attach(llava, VisionZip(keep=8))
    assert compressed.config is llava.config
    assert compressed.model is llava.model
    assert compressed.device == llava.device
    assert compressed.training == llava.training
    with pytest.raises(AttributeError):
        compressed.no_such_thing  # noqa: B018


@pytest.mark.every_family
def test_the_signature_names_what_the_model_takes(family):
    """`Trainer` drops the columns of a data set that it does not find in the signature of `forward`."""
    compressed = vlmzip.attach(family.model, VisionZip(keep=8))
    *named, others = inspect.signature(compressed.forward).parameters.values()
    assert others.kind is inspect.Parameter.VAR_KEYWORD
    names = [parameter.name for parameter in named]
    assert len(set(names)) == len(names)
    assert {*family.batch([1, "image", 5]), "input_ids", "attention_mask", "labels", "pack_rows"} <= set(names)
    assert inspect.signature(compressed.forward).bind(torch.ones(1, 1), pixel_values=None, anything=3)


def test_mistakes_are_refused(llava):
    compressed = vlmzip.attach(llava, VisionZip(keep=8))
    with pytest.raises(UserError, match="already has a compressor"):
        vlmzip.attach(compressed, VisionZip(keep=8))
    for wrong in (VisionZip, 64, None):
        with pytest.raises(UserError, match="must be a compressor, a spec or a path, got"):
            vlmzip.attach(llava, wrong)
    with pytest.raises(UserError, match="no report yet"):
        compressed.report  # noqa: B018


def test_a_budget_above_what_there_is_is_said_once(llava):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        compressed = vlmzip.attach(llava, VisionZip(keep=99))
        compressed.generate(**batch(prompt("image", 5), images=1), **GREEDY)
    assert [str(w.message) for w in said] == ["visionzip keeps all of an image's 36 visual tokens: it changes nothing"]
    assert compressed.report.after == 36


def test_text_only_prompts_work(llava):
    inputs = batch([1, 2, 3], [4, 5])
    compressed = vlmzip.attach(llava, VisionZip(keep=8))
    assert torch.equal(compressed.generate(**inputs, **GREEDY), llava.generate(**inputs, **GREEDY))
