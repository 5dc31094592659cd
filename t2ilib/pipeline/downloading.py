"""The step `download`: a data set from its server to a folder, as `t2ilib data download` does it; what has arrived is kept."""

import logging
import shutil
from collections.abc import Iterator
from typing import Any

from t2ilib.config import ConfigError
from t2ilib.data.download import Foreseen, foresee, marks_of, obtain
from t2ilib.data.download.remote import SERVERS
from t2ilib.memory import existing
from t2ilib.pipeline.job import Job, size_told, time_told

log = logging.getLogger(__name__)

RATES = (100e6, 10e6)
"""Bytes a second for which the time is told."""


def depends(job: Job) -> Any:
    told = job.pipeline.download
    return told.model_dump(mode="json", exclude={"keep_zips"})


def foreseen(job: Job) -> Foreseen:
    told, options = job.pipeline.download, job.options
    return foresee(
        told.dataset, told.folder, told.server, told.parts, told.keep_zips, told.extract, options.force_extract
    )


def needs(job: Job) -> Iterator[str]:
    told, found = job.pipeline.download, foreseen(job)
    server = told.server or SERVERS[told.dataset][0]
    yield f"{', '.join(told.parts) or 'all parts'} of {told.dataset} from {server} to {told.folder}"
    free = shutil.disk_usage(existing(told.folder)).free
    if found.there:
        yield "all of it is there"
    elif found.to_fetch is None:
        yield f"disk: the server says how much when it is asked; {size_told(free)} are free, and what does not fit is not begun"
    else:
        rates = " or ".join(f"{time_told(found.to_fetch / rate)} at {rate / 1e6:.0f} MB/s" for rate in RATES)
        fetched = "nothing, --skip-download" if job.options.skip_download else f"{size_told(found.to_fetch)}: {rates}"
        yield f"to fetch: {fetched}"
        short = (
            "" if found.of_disk * 1.1 < free else ", WHICH IS TOO LITTLE (download.keep_zips: false, extract: false)"
        )
        yield f"disk: {size_told(found.of_disk)} at the worst moment, {size_told(free)} free{short}"


def do(job: Job) -> Any:
    told, options = job.pipeline.download, job.options
    lines = obtain(
        told.dataset,
        told.folder,
        told.server,
        told.parts,
        options.skip_download,
        options.force_extract,
        told.keep_zips,
        told.extract,
    )
    for line in lines[:-2]:
        log.info("  %s", line)
    return marks_of(told.dataset, told.folder, told.parts)


def made(job: Job) -> bool:
    try:
        return foreseen(job).there
    except ConfigError:
        return False
