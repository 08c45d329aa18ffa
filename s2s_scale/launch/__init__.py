"""From a profile and a command line to the processes of a run.

``spec``       launch options, and a launch as data: command, environment, ranks
``launchers``  profile and options -> launch
``deepspeed``  arguments and environment for DeepSpeed's launcher, on this host and on others
``hosts``      host files, and checks of every host before a run starts
"""
