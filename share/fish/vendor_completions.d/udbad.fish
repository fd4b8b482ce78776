# The words come from udbad itself (click's protocol: type and value of each, and help after a tab).

function __udbad_completion
    for line in (COMP_WORDS=(commandline -cp) COMP_CWORD=(commandline -t) _UDBAD_COMPLETE=fish_complete udbad 2>/dev/null)
        set -l found (string split -m 1 , -- $line)
        switch $found[1]
            case dir
                __fish_complete_directories $found[2]
            case file
                __fish_complete_path $found[2]
            case plain
                echo $found[2]
        end
    end
end

complete --command udbad --no-files --arguments '(__udbad_completion)'
