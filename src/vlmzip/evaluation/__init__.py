"""Measuring answers: tasks, records, tables, reports."""
