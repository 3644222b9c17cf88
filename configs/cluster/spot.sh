#!/bin/bash
# A machine that may be gone the next minute. The same line on every machine: the run begins, or goes on from its mirror.
#
#   MIRROR=s3://BUCKET/PREFIX configs/cluster/spot.sh NAME --config configs/mnist.yaml
#
#   MIRROR  where a copy of the run is kept (docs/mirror.md); s3:// takes the extra `remote`
#   NOTICE  a command that succeeds once the machine is to go; asked every five seconds. Not needed where the machine is shut
#           down with SIGTERM. On EC2: 'curl -fs http://169.254.169.254/latest/meta-data/spot/instance-action'
#   NAME    of the run; other words go to train.py
set -u
name=${1:?the name of the run is missing}; shift
mirror=${MIRROR:?}
cd "$(dirname "$0")/../.." || exit
python train.py --checkpoint configs/checkpoint/mirror.yaml --checkpoint.mirror "$mirror" \
    --run_name "$name" --resume auto "$@" &
training=$!
trap 'kill -TERM $training' TERM
trap 'kill -INT $training' INT
while kill -0 $training 2>/dev/null; do
    if ${NOTICE:-false} >/dev/null; then
        kill -TERM $training   # it saves, and uploads what it saved
        break
    fi
    sleep "${EVERY_SECS:-5}" &
    wait $!
done
# A signal ends a `wait` before the training has ended.
while wait $training; code=$?; kill -0 $training 2>/dev/null; do :; done
exit $code
