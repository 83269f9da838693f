"""How the property tests run: many examples, always the same ones, and no judgement on time."""

from hypothesis import HealthCheck, settings

# Derandomized: a red run means a change of ours. To hunt for more, raise max_examples and set derandomize=False.
PROPERTY = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
