"""python worker.py FOLDER RANK WORLD MODULE CASE...: runs cases of MODULE as one process of a group; writes a file."""

import importlib
import json
import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def main(folder: Path, rank: int, world: int, module: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cases = importlib.import_module(module)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}  # as torchrun sets them; Accelerator reads them
    os.environ.update({name: str(number) for name, number in numbers.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", limit, world, rank)
    for name in names:
        scratch = folder / name
        scratch.mkdir(exist_ok=True)
        try:
            getattr(cases, name)(scratch)
            failure = ""
        except BaseException:
            failure = traceback.format_exc()
        (folder / f"{name}.{rank}.json").write_text(json.dumps(failure))
        if failure:  # the others may wait for this process forever: the process that started them ends them
            sys.exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:])
