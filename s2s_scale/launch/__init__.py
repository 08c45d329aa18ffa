"""How a profile and a command line start a run.

``wishes``       what the command line says of hosts and processes
``refusals``     flags that the profile's launcher has no use for
``plan``         profile and wishes -> command, environment and ranks, by one of the next three
``one_process``  without a launcher, or inside one
``torchrun``     words for torchrun
``deepspeed``    words and variables for DeepSpeed's launcher, here and on other hosts
``this_host``    devices, cores and ports of this host
``description``  what was planned, as data and as the text of ``--dry_run``
``starting``     what was planned is started
"""
