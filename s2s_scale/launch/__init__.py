"""From a profile and a command line to the processes of a run.

``spec``       what the command line says of hosts and processes, and what is started, as data
``launchers``  profile and options -> command, environment and ranks
``deepspeed``  arguments and variables for DeepSpeed's launcher, on this host and on others
``hosts``      host files, and what every host is asked before a run starts
"""
