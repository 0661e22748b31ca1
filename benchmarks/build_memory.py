"""Peak memory of a whole index build, stage by stage, against that of the encoder alone.

    python benchmarks/build_memory.py CORPUS [--limit 20000] [--index-type auto] [--json]

Both in processes of their own, sampled every 20 ms: private and shared memory that is resident (RSS), and of it the anonymous part.
The encoder's own is what a process has that opens it and encodes 2,048 chunks of the corpus in batches as the build does.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ENCODER = """
import itertools, sys
from index_builder.build import open_encoder
from index_builder.config import BuildConfig
from index_builder.corpus import ReadOptions, read_documents
from retro.chunks import Document
encoder = open_encoder(BuildConfig(), "cpu")
documents = (item for item in read_documents([sys.argv[1]], ReadOptions()) if isinstance(item, Document))
texts = [d.text[i : i + 250] for d in itertools.islice(documents, 2048) for i in range(0, min(len(d.text), 2500), 250)][:2048]
encoder.encode(texts, role="document")
"""


def memory(pid: int) -> tuple[int, int]:
    """Resident and anonymous bytes of a process; zeros where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0, 0
    found = dict(line.split(":", 1) for line in lines)
    return tuple(int(found.get(key, "0 kB").split()[0]) * 1024 for key in ("VmRSS", "RssAnon"))  # type: ignore[return-value]


def watch(command: list[str]) -> dict[str, tuple[int, int]]:
    """Runs a command; the greatest memory in each stage that it reports on stderr ("stage: done ...")."""
    peaks: dict[str, tuple[int, int]] = {}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors) as process,
    ):
        stage = "start"
        while process.poll() is None:
            resident, anonymous = memory(process.pid)
            errors.seek(0)
            for line in errors.read().replace("\r", "\n").splitlines():
                stage = line.split(":")[0].strip() if ":" in line else stage
            old = peaks.get(stage, (0, 0))
            peaks[stage] = (max(old[0], resident), max(old[1], anonymous))
            time.sleep(0.02)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(errors.read())
    return peaks


BUILD = """
import sys
from index_builder.build import build_index
from index_builder.config import BuildConfig
from index_builder.corpus import ReadOptions
limit = int(sys.argv[3]) or None
build_index([sys.argv[1]], sys.argv[2], BuildConfig(index_type=sys.argv[4], read=ReadOptions(limit=limit)), device="cpu",
            progress=lambda stage, done, total: print(f"{stage}: {done}", file=sys.stderr, flush=True) if done % 64 == 0 else None)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    parser.add_argument("--limit", type=int, default=20_000, help="documents; 0 means all")
    parser.add_argument("--index-type", default="auto")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    alone = max(watch([sys.executable, "-c", ENCODER, arguments.corpus]).values())
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "x.index")
        stages = watch([sys.executable, "-c", BUILD, arguments.corpus, out, str(arguments.limit), arguments.index_type])
    whole = tuple(max(peak[i] for peak in stages.values()) for i in (0, 1))
    report = {
        "encoder_rss_bytes": alone[0],
        "encoder_anonymous_bytes": alone[1],
        "build_rss_bytes": whole[0],
        "build_anonymous_bytes": whole[1],
        "stages_anonymous_bytes": {stage: peak[1] for stage, peak in stages.items()},
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    for name, (resident, anonymous) in {"encoder alone": alone, **stages, "whole build": whole}.items():
        print(f"{name:32}{resident / 2**30:8.2f} GiB resident {anonymous / 2**30:8.2f} GiB anonymous")
    print(f"above the encoder's own: {(whole[1] - alone[1]) / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
