"""The `copus` command with another worker: `launch_driver.py direct|agent WORKER-OPTION… -- COPUS-ARGUMENT…`.

`direct` starts one worker without the elastic agent, in the engine's process and environment, which takes no torch.
"""

import sys
from pathlib import Path

import launch.profile
import launch.submit
from copus.job import JobConfig
from launch.cli import main
from launch.engines import LocalEngine

how, *rest = sys.argv[1:]
split = rest.index("--")
worker = [str(Path(__file__).with_name("launch_worker.py")), *rest[:split]]


class DirectEngine(LocalEngine):
    """The local engine without its agent."""

    def command(self, run: Path, job: JobConfig, session: str, profile_only: bool) -> list[str]:
        return [sys.executable, *worker, str(run), *(["--profile-only"] if profile_only else [])]


engine = LocalEngine(worker) if how == "agent" else DirectEngine(worker)
launch.submit.engine_of = launch.profile.engine_of = lambda job: engine  # type: ignore[assignment]
sys.exit(main(rest[split + 1 :]))
