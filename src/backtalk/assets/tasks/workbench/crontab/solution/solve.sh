#!/bin/bash
set -e
cat > /home/agent/cron/crontab <<'CRON'
# jobs of the ferry office
SHELL=/bin/bash
PATH=/usr/local/bin:/usr/bin:/bin
MAILTO=office@ferry.example

# m h dom mon dow command
30 2 * * * /srv/jobs/backup.sh --all
0 7,19 * * 1-5 /srv/jobs/report.sh
5 0 1 * * /srv/jobs/rotate.sh
*/10 8-17 * * mon-fri /srv/jobs/poll.py --quiet
0 4 * * 6,7 /srv/jobs/clean.sh /var/spool/ferry
0 23 31 mar,dec * /srv/jobs/quarter.sh
0 23 30 jun,sep * /srv/jobs/quarter.sh
0 */3 * * * /srv/jobs/tide.py
30 1-22/3 * * * /srv/jobs/tide.py
45 5 * * * /srv/jobs/weigh.sh
15 1-23/2 * * * /srv/jobs/sync.sh
@daily /srv/jobs/log.sh >> /var/log/ferry-$(date +\%F).log
#20 6 * * * /srv/jobs/fuel.sh   (Ines: not before the new tank is there)
*/5 0-1,4-23 * * * /srv/jobs/queue.sh
0 6 * 4-9 * /srv/jobs/season.sh
0 6 1-15 10 * /srv/jobs/season.sh
0 9 * * sat,sun /srv/jobs/season.sh
CRON
