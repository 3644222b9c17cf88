# The environment of requirements.txt, and the project in it:
#   docker build --tag project .
#   docker run --rm --init --gpus all --ipc host --volume "$PWD/outputs:/project/outputs" project
# The command may follow: ... project python resume.py. `docker stop --time 120` gives a run the time to save.
# For the CPU alone: docker build --build-arg PIP_EXTRA_INDEX_URL=... (the address that PyTorch names for pip and CPU).
FROM python:3.12-slim

# A run records the commit that it was started from.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/*

# Here make finds the environment, also where the project is mounted at another place.
ENV VENV=/opt/venv
ENV PATH=$VENV/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
ARG PIP_EXTRA_INDEX_URL

WORKDIR /project
# The gigabytes first, in a layer that changes with the pins alone.
COPY requirements.txt ./
RUN python -m venv "$VENV" \
    && sed '/^-e/d; /^\.\//d' requirements.txt > /tmp/pins.txt \
    && pip install --requirement /tmp/pins.txt

COPY . .
RUN make setup

CMD ["python", "train.py"]
