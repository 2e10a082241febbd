from contextlib import asynccontextmanager

import pytest
import trio

from fabric.net.tasks import collapse_group


@asynccontextmanager
async def open_thing(task=trio.sleep_forever):
    with collapse_group():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task)
            try:
                yield nursery
            finally:
                nursery.cancel_scope.cancel()


async def fail():
    raise KeyError("task")


async def test_the_callers_error_arrives_as_itself():
    cause = OSError("why")
    with pytest.raises(KeyError, match="caller") as caught:
        async with open_thing():
            raise KeyError("caller") from cause
    assert caught.value.__cause__ is cause


async def test_the_tasks_error_arrives_as_itself():
    with pytest.raises(KeyError, match="task"):
        async with open_thing(fail):
            await trio.sleep_forever()


async def test_nested_groups_collapse_to_the_one_error():
    with pytest.raises(KeyError, match="inner"):
        async with open_thing(), open_thing():
            raise KeyError("inner")


async def test_several_errors_stay_a_group():
    async def fail_twice():
        async with open_thing(fail) as nursery:
            nursery.start_soon(fail)
            await trio.sleep_forever()

    with pytest.raises(ExceptionGroup) as caught:
        await fail_twice()
    assert len(caught.value.exceptions) == 2


async def test_cancellation_is_not_an_error(autojump_clock):
    with trio.move_on_after(1) as scope:
        async with open_thing():
            await trio.sleep_forever()
    assert scope.cancelled_caught


def test_nothing_raised_nothing_changed():
    with collapse_group():
        pass
    with pytest.raises(ValueError, match="plain"), collapse_group():
        raise ValueError("plain")
