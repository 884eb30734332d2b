"""From file to verified file: plan, run, report, verify."""
