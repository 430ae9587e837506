"""Wrong on purpose: where mypy finds nothing here, the wheel's types do not reach a consumer."""

from cloister_fl.study import load

epsilon: str = load("study.toml").privacy.epsilon
