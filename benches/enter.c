/* Makes only the calls that are necessary to run a program in a jail; ims-jail-shell is compared with it.
 * usage: enter PID PROGRAM [ARGUMENT...], PID being the jail's init. */
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    if (argc < 3)
        return 255;
    int init = syscall(SYS_pidfd_open, atoi(argv[1]), 0);
    if (init < 0 || setns(init, CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS) != 0) {
        perror("enter");
        return 255;
    }
    pid_t child = fork();
    if (child < 0)
        return 255;
    if (child == 0) {
        execv(argv[2], argv + 2);
        _exit(127);
    }
    int status;
    if (waitpid(child, &status, 0) != child)
        return 255;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
