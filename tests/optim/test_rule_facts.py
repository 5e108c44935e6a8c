"""What is checked without torch about a rule is what the rule says of itself."""

import pytest

from lightning_opt import anatomy, plan
from lightning_opt.optim import find_rule, list_optimizers
from lightning_opt.optim.groups import facts_of
from lightning_opt.plan.rule_facts import TABLE
from recipes import describe


@pytest.mark.parametrize("name", list_optimizers())
def test_the_table_says_of_a_rule_what_it_is(name):
    assert plan.facts(name) == facts_of(find_rule(name)), "python -m recipes.describe --write"


def test_the_table_holds_every_rule_and_nothing_else():
    assert plan.known_rules() == list_optimizers()
    assert TABLE.read_text(encoding="utf-8") == describe.rule_table(), "python -m recipes.describe --write"


def test_both_lists_of_roles_are_one():
    assert plan.ROLES == anatomy.ROLES
