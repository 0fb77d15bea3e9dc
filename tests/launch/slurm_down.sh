#!/usr/bin/env bash
# slurm_down.sh FOLDER: ends the daemons that slurm_up.sh started.
folder=${1:?a folder}
pids=$(cat "$folder"/run/slurmd.n*.pid "$folder"/run/slurmctld.pid "$folder"/run/munged.pid 2>/dev/null)
# shellcheck disable=SC2086
kill $pids 2>/dev/null
for _ in $(seq 1 100); do
  compgen -G "$folder/run/*.pid" >/dev/null || exit 0
  sleep 0.1
done
