//! Strangers at the rendezvous: stale names, replayed and forged frames, slow clients, other users (P7-P11). Whatever
//! they do, the job starts.

mod ranks;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use annulus::world::{Environment, World};
use ranks::{PATIENCE, Process, eventually, long, names_in, say, torch_rank};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Resource, Rlimit, Signal};

#[test]
fn role() {
    ranks::play(&[
        ("meet", meet),
        ("meet_in_little_room", meet_in_little_room),
        ("stay", stay),
        ("stranger", stranger),
    ]);
}

// ---- roles -------------------------------------------------------------------------------------------------------------

fn meet() {
    let world = match World::join(Environment::detect().unwrap(), ranks::options()) {
        Ok(world) => world,
        Err(error) => return say(format!("error {error}")),
    };
    assert!(world.reduce_boolean(true, true, PATIENCE).unwrap());
    say("met");
    world.teardown(PATIENCE).unwrap();
}

/// As [`meet`], in a process that may open few descriptors: enough for a job of two, not for what a frame may bring.
fn meet_in_little_room() {
    let limit = Rlimit { current: Some(LITTLE_ROOM as u64), maximum: Some(LITTLE_ROOM as u64) };
    rustix::process::setrlimit(Resource::Nofile, limit).unwrap();
    meet();
}

fn stay() {
    let world = World::join(Environment::detect().unwrap(), ranks::options()).unwrap();
    say("joined");
    std::thread::sleep(2 * PATIENCE);
    drop(world);
}

/// Tries, as whatever user it runs as, everything it could do to a job.
fn stranger() {
    let socket = PathBuf::from(std::env::var_os("TEST_SOCKET").unwrap());
    let begun = Instant::now();
    match connect(&socket) {
        Err(errno) => say(format!("connect {errno:?}")),
        Ok(connection) => {
            let answer = receive(&connection);
            say(format!("connect answered {answer:?} after {} ms", begun.elapsed().as_millis()));
        }
    }
    if let Ok(pid) = std::env::var("TEST_PID") {
        let opened = std::fs::read_dir(format!("/proc/{pid}/fd"));
        say(format!("descriptors {:?}", opened.map(|_| "listed").map_err(|error| error.kind())));
        // Descriptor numbers can be guessed.
        for fd in 3..40 {
            if let Ok(file) = std::fs::File::open(format!("/proc/{pid}/fd/{fd}")) {
                say(format!("opened {fd} {file:?}"));
            }
        }
        let memory = std::fs::File::open(format!("/proc/{pid}/mem"));
        say(format!("memory {:?}", memory.map(|_| "opened").map_err(|error| error.kind())));
    }
    say("tried");
}

// ---- a client that is no rank ------------------------------------------------------------------------------------------

fn connect(path: &Path) -> Result<OwnedFd, Errno> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    // Through the folder's descriptor: test folders have long paths.
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    let folder = rustix::fs::open(path.parent().unwrap(), flags, rustix::fs::Mode::empty())?;
    use std::os::fd::AsRawFd;
    let name = path.file_name().unwrap().to_str().unwrap();
    rustix::net::connect(&socket, &SocketAddrUnix::new(format!("/proc/self/fd/{}/{name}", folder.as_raw_fd()))?)?;
    Ok(socket)
}

/// The next frame, or None once the other side has closed.
fn receive(socket: &OwnedFd) -> Option<String> {
    let mut buffer = vec![0_u8; 70_000];
    let timeout = Some(PATIENCE);
    rustix::net::sockopt::set_socket_timeout(socket, rustix::net::sockopt::Timeout::Recv, timeout).unwrap();
    match rustix::net::recv(socket, &mut buffer[..], RecvFlags::empty()) {
        Ok((0, _)) | Err(Errno::CONNRESET) => None,
        Ok((len, _)) => Some(String::from_utf8_lossy(&buffer[..len]).into_owned()),
        Err(errno) => panic!("{errno:?}"),
    }
}

fn send(socket: &OwnedFd, bytes: &[u8]) {
    let _ = rustix::net::send(socket, bytes, SendFlags::NOSIGNAL);
}

fn send_with(socket: &OwnedFd, bytes: &[u8], fds: &[std::os::fd::BorrowedFd<'_>]) {
    let mut space = vec![std::mem::MaybeUninit::uninit(); 4096];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(fds)));
    let _ = rustix::net::sendmsg(socket, &[std::io::IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
}

fn framed(json: &str) -> Vec<u8> {
    let mut bytes = b"annulus\x01".to_vec();
    bytes.extend_from_slice(json.as_bytes());
    bytes
}

fn hello(nonce: &str, job: &str, rank: u32, world_size: u32) -> Vec<u8> {
    framed(&format!(
        r#"{{"Hello":{{"nonce":"{nonce}","job":"{job}","rank":{rank},"world_size":{world_size},"process":{{"pid":1,"token":2}}}}}}"#
    ))
}

fn nonce_of(greeting: &str) -> String {
    greeting.split("\"nonce\":\"").nth(1).unwrap().split('"').next().unwrap().to_owned()
}

/// Descriptors of the role that has few.
const LITTLE_ROOM: usize = 48;

// ---- a job whose rank 0 waits ------------------------------------------------------------------------------------------

const JOB: &str = "torchrun localhost:29500 run  restart 0";

fn job(tmpdir: &Path, role: &str, rank: u32, world_size: u32) -> Process {
    let mut command = torch_rank(role, tmpdir, rank, world_size);
    command.env("TORCHELASTIC_RESTART_COUNT", "0").env("LOCAL_WORLD_SIZE", world_size.to_string());
    Process::start(command)
}

/// Starts rank 0 of `world_size` and waits until it has its name.
fn waiting_rank_0(tmpdir: &Path, role: &str, world_size: u32) -> (Process, PathBuf) {
    let rank_0 = job(tmpdir, role, 0, world_size);
    let mut socket = None;
    eventually("rank 0 listens", || {
        let folder = names_in(tmpdir).into_iter().map(PathBuf::from).find(|path| path.is_dir());
        let names = folder.map(|folder| names_in(&folder)).unwrap_or_default();
        socket = names.into_iter().find(|name| !name.ends_with(".new")).map(PathBuf::from);
        socket.is_some()
    });
    (rank_0, socket.unwrap())
}

/// The rest of the job comes, and it starts as if nothing had been.
fn job_goes_on(tmpdir: &Path, rank_0: Process, world_size: u32) -> Duration {
    let begun = Instant::now();
    let others: Vec<Process> = (1..world_size).map(|rank| job(tmpdir, "meet", rank, world_size)).collect();
    let mut ended = vec![rank_0];
    ended.extend(others);
    for mut process in ended {
        process.expect(">> met");
        assert_eq!(process.finish().0, 0);
    }
    assert_eq!(names_in(tmpdir), [""; 0]);
    begun.elapsed()
}

// ---- tests -------------------------------------------------------------------------------------------------------------

#[test]
fn p10_forged_frames_do_no_harm() {
    let tmpdir = tempfile::tempdir().unwrap();
    let (rank_0, socket) = waiting_rank_0(tmpdir.path(), "meet", 3);
    let null = std::fs::File::open("/dev/null").unwrap();
    let fresh = || {
        let connection = connect(&socket).unwrap();
        let greeting = receive(&connection).unwrap();
        (connection, nonce_of(&greeting))
    };
    type Forgery = Box<dyn Fn(&str) -> Vec<u8>>;
    let table: Vec<(&str, Forgery)> = vec![
        ("begins", Box::new(|_| b"GET / HTTP/1.1\r\n\r\n".to_vec())),
        ("begins", Box::new(|_| vec![0; 60_000])),
        ("longer than 65536", Box::new(|_| vec![b'a'; 65_537])),
        ("longer than 65536", Box::new(|_| framed(&"[".repeat(100_000)))),
        ("1 bytes", Box::new(|_| vec![b'a'])),
        ("does not parse", Box::new(|_| framed(""))),
        ("does not parse", Box::new(|_| framed(&"[".repeat(60_000)))),
        ("does not parse", Box::new(|_| framed(r#"{"Hello":{"nonce":7}}"#))),
        ("does not parse", Box::new(|_| framed("\u{0}\u{ffff}"))),
        ("a hello was expected", Box::new(|_| framed(r#""Ready""#))),
        ("a hello was expected", Box::new(|_| framed(r#"{"Welcome":{"processes":[]}}"#))),
        ("another greeting", Box::new(|_| hello("00000000000000000000000000000000", JOB, 1, 3))),
        ("another greeting", Box::new(|_| hello("", JOB, 1, 3))),
        ("this is job", Box::new(|nonce| hello(nonce, "torchrun other", 1, 3))),
        ("expects 4 ranks", Box::new(|nonce| hello(nonce, JOB, 1, 4))),
        ("not one of", Box::new(|nonce| hello(nonce, JOB, 0, 3))),
        ("not one of", Box::new(|nonce| hello(nonce, JOB, 3, 3))),
        ("not one of", Box::new(|nonce| hello(nonce, JOB, u32::MAX, 3))),
        ("2 descriptors", Box::new(|nonce| hello(nonce, JOB, 1, 3))),
    ];
    for (reason, frame) in &table {
        let (connection, nonce) = fresh();
        send(&connection, &frame(&nonce));
        let answer = receive(&connection).unwrap_or_default();
        assert!(answer.contains("Refused") && answer.contains(reason), "expected {reason:?}: {answer}");
        assert_eq!(receive(&connection), None, "{reason}");
    }
    // Descriptors that are not what they should be, and far too many of them.
    let (connection, nonce) = fresh();
    send_with(&connection, &hello(&nonce, JOB, 1, 3), &[null.as_fd(), null.as_fd()]);
    let answer = receive(&connection).unwrap_or_default();
    assert!(answer.contains("not a memfd"), "{answer}");
    let (connection, nonce) = fresh();
    send_with(&connection, &hello(&nonce, JOB, 1, 3), &vec![null.as_fd(); 250]);
    let answer = receive(&connection).unwrap_or_default();
    assert!(answer.contains("more descriptors") || answer.contains("2 descriptors"), "{answer}");
    job_goes_on(tmpdir.path(), rank_0, 3);
}

/// Rank 0 may open no more descriptors than strangers send it, or occupy by connecting.
#[test]
fn p10_strangers_that_use_up_the_descriptors_of_rank_0_end_nothing() {
    let tmpdir = tempfile::tempdir().unwrap();
    let (rank_0, socket) = waiting_rank_0(tmpdir.path(), "meet_in_little_room", 2);
    let null = std::fs::File::open("/dev/null").unwrap();
    let fresh = || {
        let connection = connect(&socket).unwrap();
        let nonce = nonce_of(&receive(&connection).unwrap());
        (connection, nonce)
    };
    let is_refused = |connection: &OwnedFd, reason: &str| {
        let answer = receive(connection).unwrap_or_default();
        assert!(answer.contains("Refused") && answer.contains(reason), "expected {reason:?}: {answer}");
    };
    let many = vec![null.as_fd(); 2 * LITTLE_ROOM];
    for (reason, job) in [("2 descriptors", JOB), ("this is job", "torchrun other")] {
        let (connection, nonce) = fresh();
        send_with(&connection, &hello(&nonce, job, 1, 2), &many);
        is_refused(&connection, reason);
    }
    let (connection, _) = fresh();
    send_with(&connection, b"GET / HTTP/1.1\r\n\r\n", &many);
    is_refused(&connection, "begins");
    drop(connection);
    // Not even the two of a hello fit any more.
    let open = || std::fs::read_dir(format!("/proc/{}/fd", rank_0.pid())).unwrap().count();
    let mut silent = Vec::new();
    while open() < LITTLE_ROOM - 1 {
        silent.push(fresh());
    }
    let (connection, nonce) = silent.pop().unwrap();
    send_with(&connection, &hello(&nonce, "torchrun other", 1, 2), &many[..2]);
    is_refused(&connection, "this is job");
    drop((connection, silent));
    job_goes_on(tmpdir.path(), rank_0, 2);
}

/// Damaged hellos by the thousand against a living rank 0, many of them as long as a frame may be.
#[test]
fn p10_damaged_frames_by_the_thousand_cost_no_memory_and_no_job() {
    let tmpdir = tempfile::tempdir().unwrap();
    let (rank_0, socket) = waiting_rank_0(tmpdir.path(), "meet", 2);
    let resident_bytes = || {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", rank_0.pid())).unwrap();
        statm.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * rustix::param::page_size()
    };
    let mut random = annulus::strategy::Rng::new(10);
    let mut before = 0;
    for attempt in 0..if long() { 100_000 } else { 2_000 } {
        let connection = connect(&socket).unwrap();
        let nonce = nonce_of(&receive(&connection).unwrap());
        let mut bytes = hello(&nonce, JOB, 1, 2);
        for _ in 0..random.below(4) {
            let at = random.below(bytes.len() as u64) as usize;
            match random.below(4) {
                0 => bytes[at] = random.next_u64() as u8,
                1 => bytes.truncate(at + 1),
                2 => drop(bytes.splice(at..at, std::iter::repeat_n(b'[', random.below(65_000) as usize))),
                _ => drop(bytes.splice(at..at, random.next_u64().to_string().into_bytes())),
            }
        }
        send(&connection, &bytes);
        // Without its two descriptors not even a whole hello makes a rank.
        let answer = receive(&connection).unwrap();
        assert!(answer.contains("Refused"), "{answer}: {}", bytes.escape_ascii());
        if attempt == 200 {
            before = resident_bytes(); // the allocator has what it needs
        }
    }
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown <= 1 << 20, "rank 0 has grown by {grown} bytes");
    job_goes_on(tmpdir.path(), rank_0, 2);
}

/// Clients that connect and say nothing, more of them than rank 0 serves at once.
#[test]
fn p10_slow_clients_keep_nobody_waiting() {
    let tmpdir = tempfile::tempdir().unwrap();
    let (rank_0, socket) = waiting_rank_0(tmpdir.path(), "meet", 3);
    let silent: Vec<OwnedFd> = (0..80).map(|_| connect(&socket).unwrap()).collect();
    let took = job_goes_on(tmpdir.path(), rank_0, 3);
    // Two seconds for a client, and those beyond the first 64 wait for a place.
    assert!(took < Duration::from_secs(12), "{took:?}");
    drop(silent);
}

/// Each in turn is closed after its two seconds.
#[test]
fn p10_a_silent_client_is_closed_after_two_seconds() {
    let tmpdir = tempfile::tempdir().unwrap();
    let (rank_0, socket) = waiting_rank_0(tmpdir.path(), "meet", 2);
    let begun = Instant::now();
    let connection = connect(&socket).unwrap();
    assert!(receive(&connection).unwrap().contains("Greeting"));
    assert!(receive(&connection).unwrap().contains("TooSlow"));
    assert_eq!(receive(&connection), None);
    let took = begun.elapsed();
    assert!(took > Duration::from_millis(1_900) && took < Duration::from_secs(8), "{took:?}");
    job_goes_on(tmpdir.path(), rank_0, 2);
}

/// A hello recorded in one job is refused by the next, which greets with another nonce.
#[test]
fn p08_a_recorded_hello_is_refused() {
    let mut recorded = Vec::new();
    for _ in 0..2 {
        let tmpdir = tempfile::tempdir().unwrap();
        let (rank_0, socket) = waiting_rank_0(tmpdir.path(), "meet", 2);
        let connection = connect(&socket).unwrap();
        let nonce = nonce_of(&receive(&connection).unwrap());
        if recorded.is_empty() {
            recorded = hello(&nonce, JOB, 1, 2);
        } else {
            let sent = Instant::now();
            send(&connection, &recorded);
            let answer = receive(&connection).unwrap();
            assert!(answer.contains("another greeting"), "{answer}");
            let limit = if long() { Duration::from_millis(100) } else { PATIENCE };
            assert!(sent.elapsed() <= limit, "refused after {:?}", sent.elapsed());
        }
        job_goes_on(tmpdir.path(), rank_0, 2);
    }
}

/// Ranks of another run under the same address: what they are told names both.
#[test]
fn p08_ranks_that_disagree_are_refused_by_name() {
    let tmpdir = tempfile::tempdir().unwrap();
    let (rank_0, _) = waiting_rank_0(tmpdir.path(), "meet", 2);
    let (_, lines) = job(tmpdir.path(), "meet", 1, 3).finish();
    assert!(lines.iter().any(|line| line.contains("rank 1 expects 3 ranks, rank 0 expects 2")), "{lines:?}");
    let (_, lines) = job(tmpdir.path(), "meet", 0, 2).finish();
    assert!(lines.iter().any(|line| line.contains("another rank 0 waits there")), "{lines:?}");
    job_goes_on(tmpdir.path(), rank_0, 2);
}

#[test]
fn a_rank_that_comes_twice_is_refused() {
    let tmpdir = tempfile::tempdir().unwrap();
    let (rank_0, _) = waiting_rank_0(tmpdir.path(), "meet", 3);
    let first = job(tmpdir.path(), "meet", 1, 3);
    std::thread::sleep(Duration::from_secs(2)); // it is to come first
    let mut second = job(tmpdir.path(), "meet", 1, 3);
    let (_, line) = second.expect(">> ");
    assert!(line.contains("rank 1 is here already"), "{line}");
    let third = job(tmpdir.path(), "meet", 2, 3);
    for mut process in [rank_0, first, third] {
        process.expect(">> met");
    }
}

#[test]
fn p07_ranks_killed_at_any_moment_of_the_rendezvous_leave_what_the_next_job_sweeps() {
    let tmpdir = tempfile::tempdir().unwrap();
    let moments = if long() { 200 } else { 30 };
    let mut left = 0;
    for moment in 0..moments {
        let processes: Vec<Process> = (0..3).map(|rank| job(tmpdir.path(), "stay", rank, 3)).collect();
        std::thread::sleep(Duration::from_micros(moment * 30_000 / moments));
        processes.iter().for_each(|process| process.signal(Signal::KILL));
        drop(processes);
        left += usize::from(!names_in(tmpdir.path()).is_empty());
    }
    println!("{left} of {moments} kills left a name to the next job");
    // At most the folder and one name, however many jobs died.
    assert!(names_in(tmpdir.path()).len() <= 2, "{:?}", names_in(tmpdir.path()));
    let rank_0 = job(tmpdir.path(), "meet", 0, 3);
    job_goes_on(tmpdir.path(), rank_0, 3);
}

#[test]
fn p09_another_user_can_neither_connect_nor_read() {
    if !rustix::process::geteuid().is_root() {
        return ranks::skip("only root can become another user");
    }
    // The stranger must be able to run this executable.
    let own = std::env::current_exe().unwrap();
    let shared = tempfile::tempdir_in("/tmp").unwrap();
    std::fs::set_permissions(shared.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let copy = shared.path().join("stranger");
    std::fs::copy(own, &copy).unwrap();
    let as_nobody = |socket: &Path, pid: u32| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&copy);
        command.args(["role", "--exact", "--nocapture", "--quiet"]);
        command.env("ANNULUS_TEST_ROLE", "stranger").env("TEST_SOCKET", socket).env("TEST_PID", pid.to_string());
        let mut process = Process::start(command);
        let mut said = Vec::new();
        loop {
            let (_, line) = process.expect(">> ");
            if line.contains("tried") {
                return said;
            }
            said.push(line);
        }
    };
    let base = tempfile::tempdir_in("/tmp").unwrap();
    std::fs::set_permissions(base.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let (rank_0, socket) = waiting_rank_0(base.path(), "meet", 2);
    let said = as_nobody(&socket, rank_0.pid());
    assert!(said[0].contains("connect") && said[0].contains("code: 13"), "{said:?}");
    assert!(said.iter().any(|line| line.contains("descriptors Err(PermissionDenied)")), "{said:?}");
    assert!(said.iter().any(|line| line.contains("memory Err(PermissionDenied)")), "{said:?}");
    assert!(!said.iter().any(|line| line.contains("opened ")), "{said:?}");

    // Even where the folder and the socket were opened to everybody, the peer's user is asked.
    std::fs::set_permissions(socket.parent().unwrap(), std::fs::Permissions::from_mode(0o777)).unwrap();
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o777)).unwrap();
    let waits_ms = (0..3).map(|_| {
        let said = as_nobody(&socket, rank_0.pid());
        let wait_ms = said[0].split_once("connect answered None after ").map(|(_, wait)| wait.trim_end_matches(" ms"));
        wait_ms.unwrap_or_else(|| panic!("{said:?}")).parse::<u64>().unwrap()
    });
    // The shortest of three: one of them may have waited for a processor.
    let wait_ms = waits_ms.min().unwrap();
    assert!(wait_ms <= if long() { 10 } else { 10_000 }, "closed after {wait_ms} ms");
    std::fs::set_permissions(socket.parent().unwrap(), std::fs::Permissions::from_mode(0o700)).unwrap();
    job_goes_on(base.path(), rank_0, 2);
}

/// No descriptor of a running rank is a TCP or UDP socket.
#[test]
fn p11_no_port_is_opened() {
    let tmpdir = tempfile::tempdir().unwrap();
    let mut processes: Vec<Process> = (0..3).map(|rank| job(tmpdir.path(), "stay", rank, 3)).collect();
    processes.iter_mut().for_each(|process| drop(process.expect(">> joined")));
    let mut internet = Vec::new();
    for table in ["tcp", "tcp6", "udp", "udp6", "raw", "raw6"] {
        let text = std::fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default();
        internet.extend(text.lines().skip(1).filter_map(|line| Some(line.split_whitespace().nth(9)?.to_owned())));
    }
    let mut sockets = 0;
    for process in &processes {
        for entry in std::fs::read_dir(format!("/proc/{}/fd", process.pid())).unwrap().flatten() {
            let target = std::fs::read_link(entry.path()).unwrap_or_default().display().to_string();
            if let Some(inode) = target.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')) {
                sockets += 1;
                assert!(!internet.iter().any(|open| open == inode), "{target} is in /proc/net");
            }
        }
    }
    assert_eq!(sockets, 4, "a star of Unix sockets, an end each");
    processes.iter().for_each(|process| process.signal(Signal::KILL));
}

/// Nothing of a running job, or of a killed one, has a name where such names usually are.
#[test]
fn p07_a_job_has_no_name_anywhere() {
    let names = || [names_in(Path::new("/dev/shm")), names_in(Path::new("/run/user"))].concat();
    let new_since =
        |before: &[String]| -> Vec<String> { names().into_iter().filter(|name| !before.contains(name)).collect() };
    let mut seen = Vec::new();
    // Other processes make names, too, but not for every job of this test.
    for _ in 0..5 {
        let (before, tmpdir) = (names(), tempfile::tempdir().unwrap());
        let mut processes: Vec<Process> = (0..3).map(|rank| job(tmpdir.path(), "stay", rank, 3)).collect();
        processes.iter_mut().for_each(|process| drop(process.expect(">> joined")));
        let running = new_since(&before);
        assert_eq!(names_in(tmpdir.path()), [""; 0]);
        processes.iter().for_each(|process| process.signal(Signal::KILL));
        drop(processes);
        let killed = new_since(&before);
        assert_eq!(names_in(tmpdir.path()), [""; 0]);
        if running.is_empty() && killed.is_empty() {
            return;
        }
        seen.push((running, killed));
    }
    panic!("every job had a name while it ran, or afterwards: {seen:#?}");
}
