import tiny
import torch

from vqlib.system.fingerprint import digest, fingerprint, settings_of


def test_equal_models_have_equal_fingerprints_and_others_do_not():
    a, b, c = tiny.transformer(0), tiny.transformer(0), tiny.transformer(1)
    assert fingerprint(a) == fingerprint(b) != fingerprint(c)
    assert fingerprint(torch.compile(a, backend="eager")) == fingerprint(a)
    next(b.parameters()).data.view(-1)[0] += 1e-6
    assert fingerprint(a) != fingerprint(b)


def test_name_shape_dtype_and_text_count():
    zeros = torch.zeros(4)
    found = {
        digest([("a", zeros)]),
        digest([("b", zeros)]),
        digest([("a", zeros.view(2, 2))]),
        digest([("a", zeros.int())]),
        digest([("a", zeros)], about="x"),
    }
    assert len(found) == 5
    assert digest([("a", torch.zeros(2, 2).t())]) == digest([("a", torch.zeros(2, 2))]), (
        "layout in memory does not count"
    )


def test_settings_that_stand_in_no_tensor_count_and_defaults_do_not():
    a, b = tiny.transformer(), tiny.transformer()
    heads = type(a)(**dict(a.config) | {"num_attention_heads": 4, "attention_head_dim": 8}).eval()
    heads.load_state_dict(a.state_dict())
    assert fingerprint(heads) != fingerprint(a)
    vae = tiny.vae()
    before = fingerprint(vae)
    vae.register_to_config(scaling_factor=0.5)
    assert fingerprint(vae) != before
    assert "norm_eps" in a.config and "norm_eps" not in settings_of(a)
    b.register_to_config(_name_or_path="elsewhere", option_of_a_later_version=False)
    assert fingerprint(b) == fingerprint(a)
