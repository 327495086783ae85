"""What Batch Renormalization costs, against batch norm and against the other implementations.

python -m benchmarks run [--quick] [--only REGEX]     measures, prints, appends to benchmarks/results/<device>.jsonl
python -m benchmarks table [--markdown] [--into FILE] the tables, from the rows of the latest commit
"""
