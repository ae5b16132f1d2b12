"""Pipeline parallelism: schedules as data, a simulator and an executor that run the same lists."""
