/*
 * The floor: what the kernel alone asks for a container of this shape. Namespaces, an
 * overlay, /proc, pivot_root, exec; no user namespace, no ids, no limits, no filter, no
 * checks. No launcher that does more can be faster.
 *
 *     floor LOWER SCRATCH PROGRAM [ARGUMENT ...]     whole start
 *     floor --exec PROGRAM [ARGUMENT ...]            clone and exec alone
 */
#define _GNU_SOURCE
#include <err.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static int finish(pid_t child)
{
	int status;

	if (waitpid(child, &status, 0) < 0)
		err(125, "waitpid");
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static void enter(const char *lower, const char *scratch)
{
	char data[8192], root[4096], upper[4096], work[4096], path[8192];

	snprintf(root, sizeof root, "%s/root", scratch);
	snprintf(upper, sizeof upper, "%s/upper", scratch);
	snprintf(work, sizeof work, "%s/work", scratch);
	mkdir(root, 0755);
	mkdir(upper, 0755);
	mkdir(work, 0755);
	if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
		err(125, "make-rprivate");
	if (snprintf(data, sizeof data, "lowerdir=%s,upperdir=%s,workdir=%s", lower, upper, work) >= (int)sizeof data)
		errx(125, "the paths are too long");
	if (mount("overlay", root, "overlay", MS_NOSUID | MS_NODEV, data))
		err(125, "overlay");
	snprintf(path, sizeof path, "%s/proc", root);
	if (mount("proc", path, "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL))
		err(125, "proc");
	if (chdir(root) || syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH) || chdir("/"))
		err(125, "pivot_root");
}

int main(int argc, char **argv)
{
	int plain = argc > 2 && !strcmp(argv[1], "--exec");
	unsigned long flags = SIGCHLD;
	pid_t child;

	if (!plain) {
		if (argc < 4)
			errx(125, "usage: floor LOWER SCRATCH PROGRAM ... | floor --exec PROGRAM ...");
		flags |= CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNET | CLONE_NEWCGROUP;
	}
	child = syscall(SYS_clone, flags, NULL, NULL, NULL, NULL);
	if (child < 0)
		err(125, "clone");
	if (child == 0) {
		char **program = plain ? argv + 2 : argv + 3;

		if (!plain)
			enter(argv[1], argv[2]);
		execv(program[0], program);
		err(127, "%s", program[0]);
	}
	return finish(child);
}
