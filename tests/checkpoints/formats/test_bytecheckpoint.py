"""ByteCheckpoint: what the real package wrote, and what was done to it since."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.formats import bytecheckpoint, dcp, torch_file
from checkpoints.formats.pickle_values import Global
from checkpoints.formats.pickle_writer import Call, Instance, Pairs, pickled
from checkpoints.formats.source import Source
from checkpoints.formats.unpickle import unpickle_untrusted
from fabric.core.errors import ConfigError, FabricError

GOLDEN = Path(__file__).parent.parent / "golden" / "bytecheckpoint-0.0.2"


def read_all(source: Source) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (
            source.entry(name).dtype,
            tuple(source.entry(name).shape),
            b"".join(bytes(part) for part in source.windows(name, 8)),
        )
        for name in source.names()
    }


def refusal(path: Path) -> FabricError:
    with pytest.raises(FabricError) as caught:
        bytecheckpoint.open_source(path)
    assert caught.value.next_step
    return caught.value


@pytest.fixture
def copied(tmp_path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "c"))


@pytest.mark.parametrize("inside", ["", "global_step_7"])
def test_what_the_package_wrote(inside) -> None:
    path = GOLDEN / inside
    assert bytecheckpoint.sniff(path)
    assert not dcp.sniff(path)
    with (
        bytecheckpoint.open_source(path) as source,
        torch_file.open_source(GOLDEN / "whole.pt") as whole,
    ):
        found, wanted = read_all(source), read_all(whole)
        generators = {name for name in found if name.startswith("rng/")}
        assert {name: found[name] for name in found if name not in generators} == wanted
        assert generators == {f"rng/rank_{rank}.torch_rng_state" for rank in (0, 1)}
        assert source.state["optimizer"] == whole.state["optimizer"]
        assert source.state["ranks"]["1"] == {"epoch": 3, "rank": 1}
        assert source.ignored == ()
        assert len(source.boxes("model/a.weight")) == 2


def test_the_latest_must_be_there(copied) -> None:
    (copied / "latest_checkpointed_iteration.txt").write_text("8")
    assert isinstance(refusal(copied), ConfigError)
    (copied / "latest_checkpointed_iteration.txt").write_text("../x")
    assert isinstance(refusal(copied), ConfigError)


def test_parts_that_are_not_read_are_told(copied) -> None:
    (copied / "global_step_7" / "loader_ckpt").mkdir()
    with bytecheckpoint.open_source(copied) as source:
        assert [each.name for each in source.ignored] == ["loader_ckpt"]


def test_files_that_are_not_what_they_were(copied) -> None:
    file = copied / "global_step_7" / "model" / "__1_0.distcp"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    assert refusal(copied).code == "E_SIZE"
    file.write_bytes(data + b"\0")
    assert refusal(copied).code == "E_MIXED"
    file.unlink()
    assert refusal(copied).code == "E_MISSING_FILE"


def test_hostile_extra_state(copied, tmp_path) -> None:
    class Danger:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.mkdir, (tmp_path / "pwned",)

    torch.save(Danger(), copied / "global_step_7/extra_state/extra_state_rank_0.pt")
    assert refusal(copied).code == "E_PICKLE"
    (copied / "global_step_7/model/.metadata").write_bytes(pickle.dumps(Danger()))
    assert refusal(copied).code == "E_PICKLE"
    assert not (tmp_path / "pwned").exists()


def rewritten(path: Path, edit: Callable[[dict[Any, Any]], object]) -> None:
    """Edit an index without the package: read it inert, write it again."""
    root: Any = unpickle_untrusted(path.read_bytes(), modules=("bytecheckpoint",))

    def live(value: Any) -> Any:
        if isinstance(value, Global) or not isinstance(value, list | tuple | dict):
            if not hasattr(value, "kind"):
                return value
            if value.args:
                return Call(value.kind, tuple(map(live, value.args)))
            return Instance(value.kind, live(value.state if value.state else {}))
        if isinstance(value, dict):
            return Pairs([(live(key), live(item)) for key, item in value.items()])
        return type(value)(map(live, value))

    edit(root.state)
    path.write_bytes(pickled(live(root)))


def test_lying_index(copied) -> None:
    index = copied / "global_step_7/model/.metadata"
    good = index.read_bytes()

    def edited(edit: Callable[[dict[Any, Any]], object]) -> str:
        index.write_bytes(good)
        rewritten(index, edit)
        return refusal(copied).code

    rewritten(index, lambda root: None)
    with bytecheckpoint.open_source(copied) as source:
        assert "model/a.weight" in source.names()

    def place(**changes: object) -> Callable[[dict[Any, Any]], object]:
        return lambda root: next(iter(root["storage_data"].values())).state.update(
            changes
        )

    def header(value: object) -> Callable[[dict[Any, Any]], object]:
        def edit(root: dict[Any, Any]) -> None:
            headers = root["all_tensor_metadata"]
            headers[next(iter(headers))] = value

        return edit

    assert edited(place(relative_path="../../x")) == "E_PATH"
    assert edited(place(offset=1)) in ("E_MIXED", "E_SIZE")
    assert edited(place(length=1 << 40)) == "E_SIZE"
    assert edited(header(None)) == "E_MIXED"
    assert edited(header(b"\x80\x02N.")) == "E_MIXED"
    assert edited(header(b"\x80\x02cos\nsystem\n.")) == "E_PICKLE"
    assert edited(lambda root: root.pop("all_tensor_metadata")) == "E_INDEX"
    assert edited(lambda root: root["storage_data"].popitem()) == "E_GAP"
    assert edited(lambda root: root["state_dict_metadata"].popitem()) == "E_INDEX"
