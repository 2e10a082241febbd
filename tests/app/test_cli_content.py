"""What is said of a fetch while it runs."""

import pytest

from dht.progress import Progress
from fabric.app.cli_content import progress_text


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (Progress(), "looking for a peer that holds it"),
        (Progress(3, 9, 2, 0.0), "3 of 9 blocks, from 2 peers"),
        (Progress(3, 9, 0, 4.2), "3 of 9 blocks; waiting for a holder since 4 s"),
    ],
)
def test_progress_in_words(progress, text):
    assert progress_text(progress) == text
