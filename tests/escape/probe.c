/* probe: one system call from inside a container, by a chosen way in, and one word about what came of it.
 *
 *     probe WAY CALL [ARGUMENT ...]
 *
 * WAY    libc    the C library's function of that name
 *        raw     syscall(2)
 *        x32     the number with bit 30 set
 *        i386:N  the 32-bit entry of x86_64 (int 0x80) with i386's own number N
 *        stacked raw, below a filter of this process's own that allows everything
 * ARGUMENT  a number; s:TEXT; x:HEX bytes; mem:N zeroed bytes; fd:PATH opened for reading; path:PATH by O_PATH;
 *        pty a terminal that controls this process; sock:FAMILY:TYPE; self this process's id;
 *        pidfd of this process; iov: one of 8 bytes
 *
 * Prints "worked" or the name of the errno. Who is killed prints nothing: the exit status says it.
 * Pointers lie below 4 GiB, so that the 32-bit entry can use them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/acct.h>
#include <sys/fanotify.h>
#include <sys/ioctl.h>
#include <sys/klog.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/quota.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timex.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>
#ifdef __x86_64__
#include <sys/io.h>
#endif

typedef long (*function)(long, ...);

struct call {
    const char *name;
    long number;
    void *libc;
};

#define BOTH(name) {#name, SYS_##name, (void *)name},
#define RAW(name) {#name, SYS_##name, NULL},
#define SINCE(name, number) {#name, number, NULL},

static const struct call calls[] = {
    BOTH(getpid) BOTH(mount) BOTH(umount2) BOTH(unshare) BOTH(setns) BOTH(chroot) BOTH(mknodat) BOTH(sethostname)
    BOTH(setdomainname) BOTH(swapon) BOTH(swapoff) BOTH(settimeofday) BOTH(clock_settime) BOTH(acct) BOTH(ptrace)
    BOTH(process_vm_readv) BOTH(process_vm_writev) BOTH(ioctl) BOTH(socket) BOTH(personality) BOTH(prctl)
    BOTH(quotactl) BOTH(open_by_handle_at) BOTH(fanotify_init) BOTH(setxattr) BOTH(fchownat) BOTH(setuid) BOTH(setgroups)
    BOTH(memfd_create) BOTH(kill) BOTH(setpriority) BOTH(adjtimex) BOTH(shmget)
    {"syslog", SYS_syslog, (void *)klogctl},
    RAW(reboot) RAW(clone) RAW(pivot_root) RAW(keyctl) RAW(add_key) RAW(request_key) RAW(bpf) RAW(perf_event_open)
    RAW(userfaultfd) RAW(init_module) RAW(finit_module) RAW(delete_module) RAW(kexec_load) RAW(seccomp) RAW(kcmp)
    RAW(lookup_dcookie) RAW(vhangup) RAW(move_pages) RAW(migrate_pages) RAW(capset) RAW(execveat) RAW(ioprio_set)
    RAW(sched_setscheduler) RAW(sched_setattr) RAW(tgkill) RAW(mbind) RAW(nfsservctl) RAW(syncfs)
    RAW(madvise)
    /* From 424 on every architecture counts alike. */
    SINCE(pidfd_send_signal, 424) SINCE(io_uring_setup, 425) SINCE(io_uring_enter, 426) SINCE(io_uring_register, 427)
    SINCE(open_tree, 428) SINCE(move_mount, 429) SINCE(fsopen, 430) SINCE(fsconfig, 431) SINCE(fsmount, 432)
    SINCE(fspick, 433) SINCE(pidfd_open, 434) SINCE(clone3, 435) SINCE(pidfd_getfd, 438) SINCE(process_madvise, 440)
    SINCE(mount_setattr, 442) SINCE(quotactl_fd, 443) SINCE(memfd_secret, 447) SINCE(statmount, 457)
    SINCE(listmount, 458) SINCE(socketcall, -1)
#ifdef SYS_kexec_file_load
    RAW(kexec_file_load)
#endif
#ifdef __x86_64__
    BOTH(iopl) BOTH(ioperm) RAW(modify_ldt) RAW(uselib) RAW(ustat) RAW(sysfs) RAW(_sysctl) RAW(create_module)
#endif
};

static void die(const char *what) {
    printf("probe: %s: %s\n", what, strerror(errno));
    exit(2);
}

static char *low(size_t size) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_32BIT
    flags |= MAP_32BIT;
#endif
    char *memory = mmap(NULL, size + 1, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED)
        die("mmap");
    return memory;
}

static long bytes(const char *hex) {
    size_t size = strlen(hex) / 2;
    char *memory = low(size);
    for (size_t i = 0; i < size; i++) {
        unsigned value;
        sscanf(hex + 2 * i, "%2x", &value);
        memory[i] = (char)value;
    }
    return (long)memory;
}

/* A pseudo terminal of this container, which controls this process from here on. */
static long terminal(void) {
    int master = posix_openpt(O_RDWR | O_NOCTTY);
    if (master < 0 || grantpt(master) || unlockpt(master))
        die("a terminal");
    if (fork() != 0) {
        int status;
        waitpid(-1, &status, 0);
        if (WIFSIGNALED(status))
            raise(WTERMSIG(status));
        exit(WEXITSTATUS(status));
    }
    setsid();
    int slave = open(ptsname(master), O_RDWR);
    if (slave < 0 || ioctl(slave, TIOCSCTTY, 0))
        die("a controlling terminal");
    return slave;
}

static long argument(const char *text) {
    if (!strncmp(text, "s:", 2))
        return (long)strcpy(low(strlen(text + 2)), text + 2);
    if (!strncmp(text, "x:", 2))
        return bytes(text + 2);
    if (!strncmp(text, "mem:", 4))
        return (long)low(strtoul(text + 4, NULL, 0));
    if (!strncmp(text, "fd:", 3) || !strncmp(text, "path:", 5)) {
        int descriptor = open(strchr(text, ':') + 1, (*text == 'f' ? O_RDONLY : O_PATH) | O_CLOEXEC);
        if (descriptor < 0)
            die(text);
        return descriptor;
    }
    if (!strncmp(text, "sock:", 5)) {
        int family, type;
        sscanf(text + 5, "%d:%d", &family, &type);
        return socket(family, type, 0);
    }
    if (!strcmp(text, "pty"))
        return terminal();
    if (!strcmp(text, "self"))
        return getpid();
    if (!strcmp(text, "pidfd")) {
        long descriptor = syscall(434, getpid(), 0);
        if (descriptor < 0)
            die(text);
        return descriptor;
    }
    if (!strncmp(text, "iov:", 4)) {
        struct iovec *vector = (struct iovec *)low(sizeof *vector);
        vector->iov_base = text[4] ? (void *)strtoul(text + 4, NULL, 0) : low(8);
        vector->iov_len = 8;
        return (long)vector;
    }
    return (long)strtoull(text, NULL, 0);
}

static long int80(long number, const long *a) {
#ifdef __x86_64__
    long result;
    /* ebp is the sixth argument, and may be the frame pointer. */
    __asm__ volatile("push %%rbp\n\tmov %7, %%rbp\n\tint $0x80\n\tpop %%rbp"
                     : "=a"(result)
                     : "0"(number), "b"(a[0]), "c"(a[1]), "d"(a[2]), "S"(a[3]), "D"(a[4]), "r"(a[5])
                     : "memory", "r8", "r9", "r10", "r11");
    result = (int)result;
    if (result < 0 && result > -4096) {
        errno = (int)-result;
        return -1;
    }
    return result;
#else
    (void)number, (void)a;
    errno = ENOSYS;
    return -1;
#endif
}

/* A filter of our own: the most strict answer counts, so it can take nothing back (seccomp(2)). */
static void allow_everything(void) {
    struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {1, &allow};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0))
        die("a filter");
}

int main(int count, char **words) {
    if (count < 3)
        return 2;
    const char *way = words[1];
    const struct call *call = NULL;
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
        if (!strcmp(calls[i].name, words[2]))
            call = &calls[i];
    if (!call || count > 9)
        return 2;
    long a[6] = {0}, result;
    for (int i = 3; i < count; i++)
        a[i - 3] = argument(words[i]);
    pid_t self = getpid();
    errno = 0;
    if (!strcmp(way, "libc")) {
        if (!call->libc)
            return 2;
        result = ((function)call->libc)(a[0], a[1], a[2], a[3], a[4], a[5]);
        result = result == -1 || (int)result == -1 ? -1 : result;
    } else if (!strcmp(way, "raw") || !strcmp(way, "stacked")) {
        if (*way == 's')
            allow_everything();
        result = syscall(call->number, a[0], a[1], a[2], a[3], a[4], a[5]);
    } else if (!strcmp(way, "x32")) {
        result = syscall(call->number | 0x40000000, a[0], a[1], a[2], a[3], a[4], a[5]);
    } else if (!strncmp(way, "i386:", 5)) {
        result = int80(strtol(way + 5, NULL, 0), a);
    } else {
        return 2;
    }
    int number = errno;
    if (getpid() != self)
        _exit(0); /* the child of a clone */
    puts(result == -1 ? strerrorname_np(number) : "worked");
    return 0;
}
