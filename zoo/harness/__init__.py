"""Evaluation: tasks, records, the cached runner, paired statistics, comparison and verification.

Import the modules directly (`from zoo.harness.tasks import Task`); this file imports nothing.
"""
