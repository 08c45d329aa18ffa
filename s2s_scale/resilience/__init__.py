"""Faults, requests to stop, and restarts.

``supervisor``       runs a launcher to its end, and starts the run again after a fault
``torchrun``         torchrun, with the exit code of the rank that failed
``hub``              the one server of a run, for reports and heartbeats
``messages``         JSON messages between processes that share the run's key
``reports``          how a rank reports a failure, or that it is done
``watchdog``         a rank's thread that sends heartbeats and ends it after a fault
``health``           decides from the heartbeats whether a rank is lost or the run hangs
``preemption``       requests to stop: signals, the supervisor, notices of the host
``gcp_maintenance``  Google Cloud's notices of maintenance and preemption
"""
