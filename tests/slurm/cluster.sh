#!/usr/bin/env bash
# A private SLURM for the tests: two nodes on loopback, accounting, no systemd, everything in one folder.
# usage: cluster.sh install | start FOLDER PORT | stop FOLDER | controller FOLDER (restarts slurmctld)
# FOLDER must be short (it holds sockets). PORT is the first of five on 127.0.0.1. Clients need SLURM_CONF=FOLDER/slurm.conf.
set -euo pipefail
packages="slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core mariadb-client-core"
export PATH=$PATH:/usr/sbin:/sbin

if [ "$1" = install ]; then
    dpkg -s $packages >/dev/null 2>&1 && exit 0
    apt=apt-get
    [ "$(id -u)" = 0 ] || apt="sudo -n apt-get"
    $apt update -qq
    # policy-rc.d: Debian would start the system's own daemons, which nobody configured
    exec env DEBIAN_FRONTEND=noninteractive $apt install -yqq --no-install-recommends $packages
fi

action=$1 D=$2 me=$(id -un) host=$(hostname -s)
export SLURM_CONF=$D/slurm.conf
unset ${!SLURM_JOB*} ${!SLURM_STEP*} # being started from inside a job must not matter

write_settings() { # first port
    local n names="" loopback=""
    mkdir -p "$D"/{state,log,run,spool/127.0.0.1,spool/127.0.0.2}
    (umask 077; head -c 1024 /dev/urandom >"$D/munge.key")
    # daemons bind what the host name resolves to; ask for that only where it is loopback
    case "$(getent ahostsv4 "$host" | head -n 1)" in 127.*) loopback=1 ;; esac
    : >"$D/cgroup.conf"
    cat >"$D/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$1
FirstJobId=$(($1 % 9000 + 100))
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
# cred_expire: how long a requeued job waits before it may start
AuthInfo=socket=$D/run/munge.sock,cred_expire=5
${loopback:+CommunicationParameters=NoCtldInAddrAny,NoInAddrAny}
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd.%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$(($1 + 2))
AccountingStoragePass=$D/run/munge.sock
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=600
MessageTimeout=30
MailProg=/bin/true
CONF
    for n in 1 2; do # node names are addresses: MASTER_ADDR, made from them, resolves
        echo "NodeName=127.0.0.$n NodeHostname=$host NodeAddr=127.0.0.1 Port=$(($1 + 2 + n)) CPUs=8 RealMemory=8192"
    done >>"$D/slurm.conf"
    cat >>"$D/slurm.conf" <<CONF
PartitionName=main Nodes=127.0.0.[1-2] Default=YES MaxTime=UNLIMITED PriorityTier=10 GraceTime=60 DefMemPerCPU=64
PartitionName=high Nodes=127.0.0.[1-2] MaxTime=UNLIMITED PriorityTier=20 PreemptMode=OFF DefMemPerCPU=64
CONF
    (umask 077; cat >"$D/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$D/run/munge.sock
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$(($1 + 2))
${loopback:+CommunicationParameters=NoInAddrAny}
SlurmUser=$me
LogFile=$D/log/slurmdbd.log
PidFile=$D/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$(($1 + 1))
StorageUser=slurm
StoragePass=tests
StorageLoc=slurm_acct
CONF
    )
}

wait_for() { # seconds command...
    local i n=$(($1 * 10)); shift
    for i in $(seq "$n"); do "$@" >/dev/null 2>&1 && return 0; sleep 0.1; done
    echo "cluster.sh: waited in vain for: $*" >&2; tail -n 15 "$D"/log/*.log >&2; return 1
}
listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
answering() { scontrol ping | grep -q UP; }
ready() { [ "$(sinfo -h -N -o %t | sort -u)" = idle ]; }
gone() { ! grep -q '^State:.[^Z]' "/proc/$1/status" 2>/dev/null; } # process 1 of a container may take seconds to reap

start_database() { # its port
    mariadb-install-db --no-defaults --user="$me" --datadir="$D/db" --auth-root-authentication-method=normal \
        --skip-test-db >"$D/log/install.log" 2>&1
    cat >"$D/init.sql" <<SQL
CREATE DATABASE slurm_acct;
CREATE USER 'slurm'@'%' IDENTIFIED BY 'tests';
GRANT ALL ON slurm_acct.* TO 'slurm'@'%';
SQL
    mariadbd --no-defaults --user="$me" --datadir="$D/db" --socket="$D/run/db.sock" --pid-file="$D/run/mariadbd.pid" \
        --bind-address=127.0.0.1 --port="$1" --skip-name-resolve --innodb-buffer-pool-size=32M --innodb-log-file-size=16M \
        --innodb-flush-log-at-trx-commit=0 --performance-schema=OFF --init-file="$D/init.sql" \
        >"$D/log/mariadb.log" 2>&1 </dev/null &
    disown
    wait_for 60 listening "$1"
    slurmdbd
    wait_for 60 listening "$(($1 + 1))"
    wait_for 20 sacctmgr -i add cluster test
}

kill_all() { # pid files, in order
    local file pid
    for file in "$@"; do
        pid=$(cat "$file" 2>/dev/null) || continue
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 100); do gone "$pid" && break; sleep 0.1; done
        gone "$pid" || kill -9 "$pid" 2>/dev/null || true
        rm -f "$file"
    done
}

case "$action" in
start)
    write_settings "$3"
    munged --force --key-file="$D/munge.key" --socket="$D/run/munge.sock" --pid-file="$D/run/munged.pid" \
        --log-file="$D/log/munged.log" --seed-file="$D/run/munge.seed" --num-threads=2 2>>"$D/log/munged.log"
    wait_for 20 test -S "$D/run/munge.sock"
    start_database "$(($3 + 1))"
    slurmctld 2>>"$D/log/slurmctld.log"
    wait_for 60 answering
    for n in 1 2; do slurmd -N "127.0.0.$n" 2>>"$D/log/slurmd.127.0.0.$n.log"; done
    wait_for 60 ready
    ;;
controller)
    kill_all "$D/run/slurmctld.pid"
    slurmctld 2>>"$D/log/slurmctld.log"
    wait_for 60 answering
    ;;
stop)
    timeout 10 scancel -f -u "$me" 2>/dev/null || true
    for _ in $(seq 50); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.2; done
    for file in "$D"/run/*.pid; do # nothing of them is kept
        pid=$(cat "$file" 2>/dev/null) && kill -9 "$pid" 2>/dev/null || true
    done
    for folder in /proc/[0-9]*; do # step daemons and tasks that outlived that: their environment names our slurm.conf
        if [ "${folder#/proc/}" != $$ ] && grep -qzFx "SLURM_CONF=$D/slurm.conf" "$folder/environ" 2>/dev/null; then
            kill -9 "${folder#/proc/}" 2>/dev/null || true
        fi
    done
    ;;
esac
