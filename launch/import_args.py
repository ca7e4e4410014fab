"""`copus import-args`: the job file for a training that another tool's arguments describe."""


