"""`raychain doctor`: what a run needs of a machine, a cluster and a storage, looked at one by one."""
