"""A server in a process of its own, whose program draws a token every few hundredths of a second.

`python serving.py PORT_FILE SECONDS DRAIN_SECONDS`: writes its port, is ready after SECONDS.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))
from served import running

from xgen.serve.app import Model, Server
from xgen.serve.logs import start_logs
from xgen.serve.options import Options
from xgen.serve.run import run
from xgen.serve.web import open_socket


def main(port_file: Path, seconds: float, drain_seconds: float) -> None:
    with running(pace=lambda name: time.sleep(0.02 if name == "decode" else 0)) as found:

        def load() -> Model:
            time.sleep(seconds)
            return found.model

        listening = open_socket("127.0.0.1", 0)
        port_file.write_text(str(listening.getsockname()[1]))
        start_logs()
        run(Server(Options(drain_seconds=drain_seconds)), listening, load)
    print("ended", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
