#!/bin/sh
# Runs once, as root of a sandbox with network. What it adds becomes a layer,
# which every tenant with this same script shares.
set -e
apt-get update
apt-get install -y --no-install-recommends bc
