"""The suite: methods x engines x models on one dataset, one process per run, rows, table and picture."""
