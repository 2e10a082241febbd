import pytest

from training.messages import Finished

pytestmark = pytest.mark.slow


async def test_three_workers_train_and_end_with_equal_digests(cluster, spec):
    workers = await cluster.start(3, spec())
    await cluster.apply(workers)
    await cluster.until(lambda: all(w.of(Finished) for w in workers), 60)
    facts = [w.of(Finished)[0].facts for w in workers]
    assert len({f["state_digest"] for f in facts}) == 1
    assert len({f["parameter_digest"] for f in facts}) == 1
    assert len({f["validation_loss"] for f in facts}) == 1
