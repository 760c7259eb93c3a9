import pytest
import torch

from vlmzip import Grid, Signal, UserError, VisualTokens


def test_prefix_and_grid_must_fill_the_tokens():
    with pytest.raises(ValueError, match="do not fill"):
        VisualTokens(torch.zeros(1, 10, 2), Grid(1, 3, 3), prefix=0)


def test_plain_count_leaves_the_prefix_out_unless_the_model_passes_it():
    features = torch.zeros(1, 10, 2)
    assert VisualTokens(features, Grid(1, 3, 3), prefix=1).plain_count == 9
    assert VisualTokens(features, Grid(1, 3, 3), prefix=1, passes_prefix=True).plain_count == 10


def test_shapes_in_signatures_are_executed():
    with pytest.raises(Exception, match="features"):
        VisualTokens(torch.zeros(10, 2), Grid(1, 3, 3))


def test_a_signal_that_is_not_there_is_an_error_that_says_how_to_get_it():
    tokens = VisualTokens(torch.zeros(2, 9, 2), Grid(1, 3, 3), keys=torch.ones(2, 9, 4))
    assert tokens.signals == {"keys"}
    assert tokens.keys.shape == (2, 9, 4)
    with pytest.raises(UserError, match=r"came without cls_attention: name Signal.CLS_ATTENTION in the method's"):
        tokens.cls_attention  # noqa: B018
    with pytest.raises(UserError, match=r"came without llm_input: name Signal.TEXT_FEATURES in"):
        tokens.llm_input  # noqa: B018
    with pytest.raises(UserError, match=r"came without projector: name Signal.PROJECTOR in"):
        tokens.projector  # noqa: B018


def test_parts_of_an_image_keep_the_signals_of_their_tokens_and_the_projector():
    numbers, project = torch.arange(9.0), torch.nn.Linear(1, 3)
    received = torch.stack([numbers, -numbers], -1)[None]
    tokens = VisualTokens(
        numbers.view(1, 9, 1), Grid(1, 2, 4), 1, projector=project, attention_received=received,
        last_cls_attention=numbers[None], last_keys=numbers.view(1, 9, 1), encoder_features=numbers.view(1, 9, 1),
    )  # fmt: skip
    window = tokens.window((1, 2), (0, 2))
    assert window.last_cls_attention.tolist() == [[0, 5, 6]]
    assert torch.equal(window.attention_received, received[:, [0, 5, 6]])
    for name in ("last_keys", "encoder_features"):
        assert getattr(window, name).flatten().tolist() == [0, 5, 6]
    both = VisualTokens(
        tokens.features.repeat(2, 1, 1), tokens.grid, 1, projector=project, keys=tokens.last_keys.repeat(2, 1, 1)
    )
    clip = both.clips(torch.tensor([[0, 1]]))
    assert clip.keys.shape == (1, 18, 1)
    assert window.projector is project
    assert clip.projector is project
    assert tokens.rows(torch.tensor([0])).projector is project


def test_every_signal_can_be_given_and_read():
    shapes = {
        "text_attention": (2, 3, 9), "text_features": (2, 3, 2), "pixels": (2, 3, 6, 6), "keys": (2, 9, 4),
        "attention_received": (2, 9, 3), "candidate_attention": (2, 3, 5), "last_keys": (2, 9, 8),
        "encoder_features": (2, 9, 5),
        "llm_keys": (2, 9, 8), "llm_states": (2, 9, 2),
    }  # fmt: skip
    for signal in Signal:
        values = torch.nn.Linear(2, 3) if signal == Signal.PROJECTOR else torch.rand(shapes.get(signal, (2, 9)))
        tokens = VisualTokens(torch.zeros(2, 9, 2), Grid(1, 3, 3), **{signal: values})
        assert getattr(tokens, signal) is values


def test_rows_and_replacing_keep_everything_else():
    tokens = VisualTokens(
        torch.arange(36.0).view(2, 9, 2), Grid(1, 2, 4), 1, layer=3, passes_prefix=True, keys=torch.rand(2, 9, 4)
    )
    second = tokens.rows(torch.tensor([1]))
    assert torch.equal(second.features, tokens.features[1:])
    assert torch.equal(second.keys, tokens.keys[1:])
    other = tokens.replace(features=tokens.features + 1)
    for made in (second, other):
        assert (made.grid, made.prefix, made.layer, made.passes_prefix) == (Grid(1, 2, 4), 1, 3, True)
    assert other.keys is tokens.keys
    assert torch.equal(other.features, tokens.features + 1)


def test_tokens_without_a_grid_form_no_clip():
    with pytest.raises(UserError, match="put a method that compares frames before the method that leaves no grid"):
        VisualTokens(torch.zeros(2, 9, 2), None).clips(torch.tensor([[0, 1]]))
