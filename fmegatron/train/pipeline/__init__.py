"""Pipeline parallelism: schedules that are plain data, layouts of layers, one executor, timelines simulated and measured."""
