"""`copus` with another worker, as a process: `launch_driver.py direct|agent WORKER-OPTION… -- ARGUMENT…`."""

import sys

from launch_jobs import copus_here

how, *rest = sys.argv[1:]
split = rest.index("--")
sys.exit(copus_here(*rest[split + 1 :], worker=rest[:split], how=how))
