"""The sub-commands.

`doctor` with `doctor_host`, `doctor_cluster`, `finding` and `echo` judges a host before, or
while, it is a node; `show` asks a running one; `docker_opts` translates for the Docker daemon.
"""
