import tiny
import torch

from vqlib.system.fingerprint import digest, fingerprint


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
