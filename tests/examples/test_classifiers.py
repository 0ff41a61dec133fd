import pytest

from tests.examples.running import run


@pytest.mark.parametrize("name", ["learned_temperatures", "vit_token"])
def test_example_holds_what_it_claims(name):
    run(name)
