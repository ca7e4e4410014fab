from copus.job import JobConfig as JobConfig
from copus.job import JobError as JobError
from copus.job import load_job as load_job
from copus.meter.batch_controller import BatchController as BatchController
from copus.meter.noise_meter import NoiseMeter as NoiseMeter
from copus.planning import Planner as Planner
from copus.planning import plan as plan
from profiles.table import ThroughputTable as ThroughputTable
