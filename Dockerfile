# docker build -t megacpt .      The CUDA libraries come with torch's wheel; the host needs only the driver.
FROM python:3.12-slim
# Triton compiles a small launcher with the system's compiler at run time.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /work
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt
COPY setup.py pyproject.toml README.md LICENSE ./
COPY megacpt ./megacpt
COPY kernels ./kernels
COPY launch ./launch
RUN pip install --no-cache-dir --no-deps -e .
CMD ["megacpt", "doctor"]
