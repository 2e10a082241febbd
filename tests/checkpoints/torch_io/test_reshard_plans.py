"""Planners end to end, without processes: save in any layout, load in any other."""

import random
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.boxes import Box, flat_boxes, runs, whole
from checkpoints.dtypes import item_bytes, tensor_bytes
from checkpoints.load_plan import Want, plan_load
from checkpoints.manifest import FileEntry, Manifest
from checkpoints.manifest_checks import check_manifest
from checkpoints.part_layout import ChunkPlan, part_record, plan_files
from checkpoints.placements import Split, held_boxes
from checkpoints.save_plan import HeldTensor, LocalPlan, merge_plans
from checkpoints.writer import merge_parts

pytest.importorskip("torch")

from checkpoints.torch_io.load_exchange import assign_reads

pytestmark = pytest.mark.slow  # importing torch alone takes seconds

WORLDS = [1, 2, 3, 4, 6, 8]
DTYPES = ["F32", "BF16", "F8_E4M3", "I64", "BOOL"]


@st.composite
def tensors(draw):
    return {
        f"t{k}": (
            draw(st.sampled_from(DTYPES)),
            tuple(draw(st.lists(st.integers(0, 9), max_size=3))),
        )
        for k in range(draw(st.integers(1, 4)))
    }


@st.composite
def layouts(draw, wanted):
    """By rank: name -> boxes. FSDP, TP, 2-D, HSDP, PP, EP and flat, mixed by tensor."""
    world = draw(st.sampled_from(WORLDS))
    inner = draw(st.sampled_from([k for k in WORLDS if world % k == 0]))
    mesh = (world // inner, inner)
    ranks = [{} for _ in range(world)]
    for name, (_, shape) in wanted.items():
        kind = draw(st.sampled_from(["mesh", "flat", "one", "all"]))
        if kind == "one":
            ranks[draw(st.integers(0, world - 1))][name] = [whole(shape)]
        elif kind == "all":
            for rank in ranks:
                rank[name] = [whole(shape)]
        elif kind == "flat":
            volume = whole(shape).volume
            cut = st.integers(0, volume)
            cuts = draw(st.lists(cut, min_size=world - 1, max_size=world - 1))
            edges = [0, *sorted(cuts), volume]
            for rank, (begin, end) in zip(ranks, pairwise(edges), strict=True):
                rank[name] = flat_boxes(shape, begin, end)
        else:
            dims = [draw(st.integers(-1, len(shape) - 1)) for _ in mesh]
            factor = draw(st.sampled_from([1, inner]))
            for rank, place in enumerate(product(*map(range, mesh))):
                splits = [
                    Split(dim, parts, at, factor if axis == 0 else 1)
                    for axis, (dim, parts, at) in enumerate(
                        zip(dims, mesh, place, strict=True)
                    )
                    if dim >= 0
                ]
                boxes = [held.box for held in held_boxes(shape, splits)]
                ranks[rank][name] = boxes
    return ranks


def cut(data, shape, box, item):
    """The bytes of a box of a tensor."""
    out = bytearray(box.volume * item)
    for run in runs(box, whole(shape), box):
        out[run.target * item : (run.target + run.length) * item] = data[
            run.source * item : (run.source + run.length) * item
        ]
    return bytes(out)


def saved(wanted, data, ranks, frozen):
    """Files and manifest, as a save of these ranks makes them."""
    plans = [
        LocalPlan(
            tuple(
                HeldTensor(name, *wanted[name], tuple(b for b in boxes if b.volume))
                for name, boxes in rank.items()
            ),
            {},
        )
        for rank in ranks
    ]
    merged = merge_plans(plans)
    files, parts = {}, []
    for rank, plan in enumerate(merged.ranks):
        chunks = [ChunkPlan(i.name, *wanted[i.name], i.box) for i in plan.items]
        laid = plan_files(f"rank{rank}", chunks, frozen=frozen, max_file_bytes=300)
        entries = {}
        for file in laid:
            image = bytearray(file.size)
            image[: len(file.prefix)] = file.prefix
            for chunk, begin, end in file.chunks:
                item = item_bytes(chunk.dtype)
                image[begin:end] = cut(data[chunk.name], chunk.shape, chunk.box, item)
            files[file.name] = bytes(image)
            entries[file.name] = FileEntry(file.size, "0" * 64, ("0" * 64,))
        parts.append(part_record(f"rank{rank}", laid, entries))
    records, stored = merge_parts(parts)
    manifest = Manifest(
        format="fabric-checkpoint",
        version=1,
        step=0,
        tensors=stored,
        files=records,
        aliases={},
        state={},
        layout={},
        parent="",
    )
    check_manifest(manifest)
    assert set(stored) | set(merged.empty) == set(wanted)
    return files, manifest


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_save_in_any_layout_then_load_in_any_other_is_the_identity(data):
    wanted = data.draw(tensors())
    content = {
        name: random.Random(name).randbytes(tensor_bytes(*each))
        for name, each in wanted.items()
    }
    frozen = data.draw(st.sets(st.sampled_from(sorted(wanted))))
    files, manifest = saved(wanted, content, data.draw(layouts(wanted)), frozen)
    needs = []
    for rank in data.draw(layouts(wanted)):
        targets = [
            (name, box) for name, boxes in rank.items() for box in boxes if box.volume
        ]
        wants = [
            Want(manifest.tensors[name], box, k)
            for k, (name, box) in enumerate(targets)
        ]
        windows = plan_load(wants)
        needs.append([(w.file, w.number, w.mask) for w in windows])
        out = [bytearray(tensor_bytes(wanted[n][0], box.sizes)) for n, box in targets]
        for window in windows:
            for each in window.runs:
                for k in range(each.repeats):
                    source, at = (
                        each.source + k * each.source_step,
                        each.at + k * each.at_step,
                    )
                    piece = files[window.file][source : source + each.length]
                    out[each.target][at : at + each.length] = piece
        for (name, box), got in zip(targets, out, strict=True):
            dtype, shape = wanted[name]
            assert bytes(got) == cut(content[name], shape, box, item_bytes(dtype))
    # together: each window is read by one of those who need it, and nobody else's
    plan = assign_reads(needs)
    places = [(each.window.file, each.window.number) for each in plan]
    assert len(set(places)) == len(places)
    for each in plan:
        place = (each.window.file, each.window.number)
        assert each.owner in each.needers
        assert each.needers == [
            rank
            for rank, mine in enumerate(needs)
            if place in {(f, n) for f, n, _ in mine}
        ]


def test_boxes_are_what_the_other_tests_think():
    assert cut(bytes(range(12)), (3, 4), Box((1, 1), (2, 2)), 1) == bytes([5, 6, 9, 10])
