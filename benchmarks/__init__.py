"""What Batch Renormalization costs, against batch norm and against the other implementations.

python -m benchmarks run [--suite cpu|gpu|quick|full] [--only REGEX] [--device cuda] [--resume]
                                              measures, prints, appends to benchmarks/results/<device>.jsonl
python -m benchmarks table [--into FILE]      tables and targets, from the rows of each device's latest commit
python -m benchmarks plot                     the plots beside those rows
"""

import os

# torch's profiler, which counts launches here, tells on stderr when it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
