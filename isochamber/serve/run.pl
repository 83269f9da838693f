# `isochamber run TENANT [COMMAND ...]` without an interpreter's start: asks the supervisor as remote.py
# does, and waits. Started by data/bin/isochamber with the interpreter, the package, LC_ALL and the words,
# where there is a supervisor's socket and no terminal.
#
# Only the plain case is done here. Whatever else it is goes to Python by exec before anything was
# asked; whatever else it becomes (a signal, a refusal, a failure, the end of the nursery) goes there
# with what was begun, as descriptors (run.take_over). Once the request was sent it is never sent again.
#
# Builtins only: loading Socket costs as much as Python's start, and strict a tenth of all this: a test
# has it compiled with that. Numbers are the same on every machine in %numbers.

my ($python, $package, $locale, @words) = @ARGV;

# sendmsg, recvmsg, rt_sigprocmask and signalfd4, by what perl's own ELF header says (elf(5)): the class
# (2: 64 bits), the byte order (1: little) and the machine. uname(2) would not tell of a perl of 32 bits.
my %numbers = (
    '2 1 62' => [46, 47, 14, 289],      # x86-64
    '1 1 3' => [370, 372, 175, 327],    # i386
    '2 1 183' => [211, 212, 135, 74],   # AArch64
    '1 1 40' => [296, 297, 175, 355],   # ARM, EABI
    '2 1 243' => [211, 212, 135, 74],   # RISC-V
);
my ($AF_UNIX, $SOCK_STREAM, $SOCK_SEQPACKET, $SOL_SOCKET, $SCM_RIGHTS) = (1, 1, 5, 1, 1);
my ($MSG_PEEK, $MSG_NOSIGNAL, $F_SETFD, $SIG_BLOCK, $SFD_CLOEXEC) = (2, 0x4000, 2, 0, 0x80000);
# What launch/foreground.py takes care of; SIGWINCH is of a terminal.
my %signals = (HUP => 1, INT => 2, QUIT => 3, USR1 => 10, USR2 => 12, ALRM => 14, TERM => 15, TSTP => 20);

sub python {
    $locale eq '' ? delete $ENV{LC_ALL} : ($ENV{LC_ALL} = $locale);
    exec {$python} $python, @_ or print STDERR "isochamber: $python: $!\n";
    exit($! == 2 ? 127 : 126);    # ENOENT, as a shell has it
}

# As data/bin/isochamber has it, and without grep.
sub default_root {
    my $file = $ENV{ISOCHAMBER_TENANTS};
    $file = -f 'tenants.yaml' ? 'tenants.yaml' : "$package/../tenants.yaml" unless length $file;
    -f $file or return '';
    open(my $in, '<', $file) or return '';
    local $/;
    my $text = <$in>;
    return defined $text && $text !~ /^[^#\n]*root/m ? '/var/lib/isochamber' : '';
}

my $root = length $ENV{ISOCHAMBER_ROOT} ? $ENV{ISOCHAMBER_ROOT} : default_root();
$root =~ m{^/} or python('-P', '-m', 'isochamber', @words);

my (undef, $tenant, @argv) = @words;
my @isolated = ('-I', '-S', "$package/serve/__main__.py");
my @run = ('run', '--root', $root, @words[1 .. $#words]);

sub cold { python(@isolated, @run) }

# The plain case.
my @term = -t STDIN && length $ENV{TERM} ? $ENV{TERM} : ();
cold() if @argv && $argv[0] =~ /^-/ && $argv[0] ne '--';       # an option
shift @argv if @argv && $argv[0] eq '--';
cold() if grep { /[^ -~]/ } $root, $tenant, @argv, @term;      # more than quotes is to be escaped
open(my $elf, '<', '/proc/self/exe') or cold();
read($elf, my $header, 20) == 20 or cold();
my $known = $numbers{join ' ', unpack 'x4 C C x12 v', $header} or cold();
my ($sendmsg, $recvmsg, $sigprocmask, $signalfd) = @$known;

my $path = (length $ENV{ISOCHAMBER_RUN} ? $ENV{ISOCHAMBER_RUN} : '/run/isochamber') . '/control';
cold() if length($path) > 107;    # of sun_path (unix(7))
socket(my $control, $AF_UNIX, $SOCK_STREAM, 0) or cold();
connect($control, pack 'S a108', $AF_UNIX, $path) or cold();
socketpair(my $channel, my $other, $AF_UNIX, $SOCK_SEQPACKET, 0) or cold();

# A msghdr of one buffer and room for descriptors (sendmsg(2)): pointers to both, which have to stay.
sub message { pack 'P I x![L!] P L! P L! i x![L!]', undef, 0, $_[0], 1, $_[1], length $_[1], 0 }
sub buffer { pack 'P L!', $_[0], length $_[0] }
sub json { join ',', map { '"' . s/(["\\])/\\$1/gr . '"' } @_ }

my $request = '{"version":1,"verb":"run","terminal":false,"root":' . json($root) . ',"tenant":' . json($tenant)
    . ',"argv":[' . json(@argv) . ']' . (@term ? ',"term":' . json(@term) : '') . "}\n";
my $rights = pack 'L! i6', length pack('L! i6'), $SOL_SOCKET, $SCM_RIGHTS, fileno $other, 0, 1, 2;
my $buffer = buffer($request);
# What was not sent is no whole line: nothing was asked for.
syscall($sendmsg, fileno $control, message($buffer, $rights), $MSG_NOSIGNAL) == length $request or cold();
close $other;

# From here on it is asked for.
my $pidfd = -1;

sub take_over {
    fcntl $_, $F_SETFD, 0 for grep { defined fileno $_ } $channel, $control;
    my @begun = (fileno $channel, fileno($control) // -1, $pidfd);
    python(@isolated, 'take-over', @begun, @run);
}

# Until it is there a signal ends us, and the nursery what it was about to start.
recv($channel, my $word = '', 1, $MSG_PEEK);
$word eq 'S' or take_over();
close $control;

# From here on a signal waits, over the exec too, until Python takes it. One that is ignored stays so (nohup).
my $mask = 0;
for (keys %signals) { $mask |= 1 << $signals{$_} - 1 unless ($SIG{$_} // '') eq 'IGNORE' }
my $set = pack 'V2', $mask, 0;
syscall $sigprocmask, $SIG_BLOCK, $set, 0, 8;

vec(my $started = '', 63, 8) = 0;
$buffer = buffer($started);
$rights = pack 'L! i3', 0, 0, 0, -1;
syscall($recvmsg, fileno $channel, message($buffer, $rights), 0) > 0 or take_over();
(undef, my $level, my $type, $pidfd) = unpack 'L! i3', $rights;
$pidfd = -1 unless $level == $SOL_SOCKET && $type == $SCM_RIGHTS;

my $wake = syscall $signalfd, -1, $set, 8, $SFD_CLOEXEC;
take_over() if $wake < 0;
my ($awaited, $ready) = ('');
vec($awaited, $_, 1) = 1 for fileno $channel, $wake;
1 until select($ready = $awaited, undef, undef, undef) > 0;
vec($ready, fileno $channel, 1) or take_over();
recv($channel, my $packet = '', 64, $MSG_PEEK);    # who takes over reads it again
$packet =~ /^E(\d+)\z/ or take_over();
exit($1 & 127 ? 128 + ($1 & 127) : $1 >> 8);    # as errors.exit_code_of
