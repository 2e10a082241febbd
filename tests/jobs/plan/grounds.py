"""Grounds of any shape, without files."""

from hypothesis import strategies as st

from fabric.jobs.plan.ground import UNSHARED, Ground, Place, Rank

RATES = (2e9, 1e8, 1.25e7, 1e6)


def ground(shape, *, rates=RATES, memory=0, flops=1e11, rtt=0.0, levels=None):
    """A ground of nested tuples: (2, 3) is a site of two ranks and one of three."""
    ranks = []

    def place(node, path):
        start = len(ranks)
        if isinstance(node, int):
            children = [rank((*path, n)) for n in range(node)]
        else:
            children = [place(child, (*path, n)) for n, child in enumerate(node)]
        if len(children) == 1:
            return children[0]
        level = 1 + max(child.level for child in children)
        children = [
            Place(
                name=c.name,
                level=c.level,
                start=c.start,
                stop=c.stop,
                children=c.children,
                up=rates[level - 1],
                down=rates[level - 1],
                rtt_seconds=rtt,
            )
            for c in children
        ]
        name = "p" + ".".join(map(str, path))
        return Place(
            name=name,
            level=level,
            start=start,
            stop=len(ranks),
            children=tuple(children),
        )

    def rank(path):
        name = "r" + ".".join(map(str, path))
        budget = memory[len(ranks)] if isinstance(memory, tuple) else memory
        ranks.append(Rank(name=name, memory_bytes=budget, flops=flops))
        return Place(name=name, level=0, start=len(ranks) - 1, stop=len(ranks))

    root = place(shape, ())
    assert root.up == UNSHARED
    names = levels or ("host", "site", "internet", "far")[: root.level]
    return Ground(root=root, ranks=tuple(ranks), levels=tuple(names[: root.level]))


shapes = st.recursive(
    st.integers(1, 4),
    lambda inner: st.lists(inner, min_size=2, max_size=3).map(tuple),
    max_leaves=6,
).filter(lambda shape: shape != 1)
