"""The examples in the docstrings of what users call run, and print what they say."""

import doctest
import inspect
from types import SimpleNamespace

import pytest
import torch

import kdfast
from kdfast.meta import exact_hypergradient
from kdfast.models import CifarResNet, create
from kdfast.train.loop import ordinary_step
from kdfast.train.networks import network_of
from kdfast.train.trainer import Trainer

DOCUMENTED = {name: getattr(kdfast, name) for name in kdfast.__all__ if callable(getattr(kdfast, name))}
DOCUMENTED |= {"Trainer": Trainer, "create": create, "network_of": network_of}
WITHOUT = {"Alone", "Distiller", "MetaStepReport"}  # a base, a record, and what takes a student only


def taken_as_given(name):
    """What the examples do not make themselves, small."""
    torch.manual_seed(0)

    def network(*widths):
        return CifarResNet(8, widths)

    def batch(classes=10):
        return torch.randn(8, 3, 8, 8), torch.randint(classes, (8,))

    (x, y), (x_val, y_val) = batch(), batch()
    student, teacher = network(4, 4, 8), network(8, 8, 8)
    streams = SimpleNamespace(train=[(x, y)], test=[(x_val, y_val)])
    distiller = kdfast.MKD(network(4, 4, 8), teacher)
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.05)
    wide = (lambda pair: (pair[0].double(), pair[1])) if name == "exact_hypergradient" else lambda pair: pair
    return {
        **DOCUMENTED, "torch": torch, "ordinary_step": ordinary_step, "CifarResNet": CifarResNet,
        "exact_hypergradient": exact_hypergradient, "student": student, "teacher": teacher, "peer": network(4, 8, 8),
        "fresh_student": network(4, 4, 8), "first_network": teacher, "fresh_network": network(8, 8, 8),
        "another_fresh_network": network(8, 8, 8), "images": x, "x": x, "y": y, "x_val": x_val, "y_val": y_val,
        "indices": torch.arange(8), "train_labels": y, "distiller": distiller, "optimizer": optimizer,
        "meta_optimizer": torch.optim.Adam(distiller.meta_parameters(), lr=0.01), "train_batch": wide((x, y)),
        "validation_batch": wide((x_val, y_val)), "loader": [(x, y)], "search": [((x, y), (x_val, y_val))] * 2,
        "training": [(x, y)] * 2, "steps": 2, "epochs": 2, "halves": lambda epoch: ([(x, y)], [(x_val, y_val)]),
        "streams": streams,
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in DOCUMENTED if name not in WITHOUT])
def test_examples_run(name):
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(DOCUMENTED[name]))
    assert examples
    names = taken_as_given(name)
    for example in examples:
        try:
            code = compile(example.source, name, "eval")
        except SyntaxError:
            exec(example.source, names)
            continue
        value = eval(code, names)
        if example.want and doctest.SKIP not in example.options:
            assert repr(value) == example.want.strip()
