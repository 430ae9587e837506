"""Wrong on purpose: where mypy finds nothing here, the wheel's types do not reach a consumer."""

from cloister_fl.study.file import load_study

epsilon: str = load_study("study.toml").privacy.epsilon
